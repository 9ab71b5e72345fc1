"""Conversions as job arrays, for sites that allow no long-lived scheduler.

Every job plans the same work from the same recordings, does the parts whose number is its own modulo the number
of jobs, and leaves receipts; `dpipe finish` numbers them. The order of episodes is fixed by the first job that
writes it, and all would write the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..schemas.errors import UsageError


def parse_share(text: str) -> tuple[int, int]:
    """'3/16' -> (3, 16): the fourth of sixteen jobs."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit()) or int(number) >= int(count):
        raise UsageError(f"--part {text}: expected i/n with 0 <= i < n, for example 0/16")
    return int(number), int(count)


def sbatch_script(words: Sequence[str], jobs: int, workers: int, seconds: float | None) -> str:
    """An sbatch script for `dpipe WORDS` in `jobs` array jobs, and the finishing job's line."""
    if any(ord(character) < 32 for word in words for character in word):
        raise UsageError("a word of the command holds a line break: no script is written of it")
    command = shlex.join(["dpipe", *words])
    finish = shlex.join(["dpipe", "finish", *words[1:]])
    limit = round(seconds) if seconds else 4 * 3600
    return (
        "#!/usr/bin/env bash\n"
        "# Submit with sbatch; then, from the same folder:\n"
        f"#   sbatch --dependency=afterok:<job id> --wrap {shlex.quote(finish)}\n"
        "#SBATCH --job-name=dpipe\n"
        f"#SBATCH --array=0-{jobs - 1}\n"
        f"#SBATCH --cpus-per-task={workers}\n"
        f"#SBATCH --time={limit // 3600:02d}:{limit // 60 % 60:02d}:{limit % 60:02d}\n"
        "#SBATCH --requeue\n"
        "#SBATCH --signal=USR1@90\n"
        "set -euo pipefail\n"
        "# 75 means out of time, everything finished so far kept: ask for another turn.\n"
        f'{command} --workers {workers} --part "$SLURM_ARRAY_TASK_ID/{jobs}" || {{\n'
        '  code=$?; [ "$code" = 75 ] && scontrol requeue "$SLURM_JOB_ID"; exit "$code"; }\n'
    )
