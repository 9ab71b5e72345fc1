#!/usr/bin/env bash
# The main job on a fresh machine: raw recordings -> LeRobot -> targets -> stream -> a short training.
# Called by `make demo`; DPIPE is the command to run, the first argument the workspace to make.
set -euo pipefail
workspace=${1:-demo}
dpipe=${DPIPE:-dpipe}
rm -rf "$workspace"
mkdir -p "$workspace"
cd "$workspace"

step() { printf '\n$ dpipe %s\n' "$*"; "$dpipe" "$@"; }

step sample libero --episodes 40
step convert libero --to lerobot
step replay libero --limit 10
step precompute tokens
step precompute shards
step train libra --steps 300
step doctor libero
step picture libero --episode 3
step report

cat <<END

Where to look, in $PWD
  report.html                             one page: cameras, conventions, distributions, tokens, the run
  libero-003.png                          frames, actions and coarse bins of one episode
  lerobot/libero/README.md                the dataset's card: conventions, features, what was left out
  lerobot/libero/dpipe/targets/tokens/    tokens; complexity.png helps to choose how many bins
  runs/libra/libero/metrics.jsonl         losses, accuracy and data wait by step
The dataset opens in lerobot as it is:
  LeRobotDataset("local/libero", root="$PWD/lerobot/libero")
END
