"""What can be wrong with a recording or a dataset, by name: converters and the doctor speak of it in the same words.

`PROBLEMS` says of each name why it matters and what mends it. Converters describe what they find in sentences;
`problems_of` finds the names in them, so that a dropped episode and a doctor's finding can be counted together.
"""

import re
from dataclasses import dataclass

ERROR, WARN, NOTE = "error", "warn", "note"


@dataclass(frozen=True)
class Problem:
    """`why` it matters, the `remedy`, how bad it is, and whether `dpipe doctor --fix` can rebuild what is wrong."""

    why: str
    remedy: str
    severity: str = ERROR
    fixable: bool = False


_AGAIN = "fetch the file again, or convert the recording again"
_FIX = "dpipe doctor PATH --fix writes a copy with it rebuilt"
_WRITER = "write the dataset again, or convert it:  dpipe convert lerobot --raw PATH"

PROBLEMS: dict[str, Problem] = {
    # --- files ---
    "unreadable": Problem("nothing can be read from a damaged or cut file", _AGAIN),
    "refused": Problem(
        "a file asks for something no recording needs", "get it from its publisher, not a stranger"
    ),
    "missing-file": Problem("readers stop, or lerobot tries the network", _AGAIN),
    "stray-file": Problem(
        "lerobot reads every Parquet file below data/ and meta/episodes/, listed or not",
        "move it out of the dataset",
        WARN,
    ),
    "unfinished": Problem("the writer was stopped before it was done", "run the same command again"),
    "layout": Problem(
        "nothing in the folder looks like its format", "see the raw tree in `dpipe convert SOURCE -h`"
    ),
    # --- meta/ ---
    "info": Problem("readers take the shape of everything from meta/info.json", _WRITER),
    "format-version": Problem(
        "lerobot refuses another major version", "dpipe convert lerobot --raw PATH --to lerobot"
    ),
    "features": Problem("a feature that is not described as it is stored cannot be read", _WRITER),
    "feature-names": Problem(
        "lerobot's relative-action step subtracts state[i] from action[i] by position and spares grippers by name",
        "name dimensions in a flat list, in one order for state and action, with 'gripper' in a gripper's name",
        WARN,
    ),
    "feature-role": Problem(
        "lerobot makes every vector that begins with 'observation' an input and every 'action...' an output",
        "rename the column",
        WARN,
    ),
    "totals": Problem("tools plan by the totals in meta/info.json", _FIX, ERROR, True),
    "splits": Problem(
        "episodes outside every split, or in two, are lost or leak", "mend `splits` in meta/info.json"
    ),
    "tasks": Problem(
        "lerobot takes row i of meta/tasks.parquet as task i, and the sentence from its index",
        _FIX,
        ERROR,
        True,
    ),
    "episodes": Problem("episodes are found by their row in meta/episodes", _WRITER),
    "episode-range": Problem(
        "frames are found by dataset_from_index and dataset_to_index", _FIX, ERROR, True
    ),
    "episode-tasks": Problem(
        "the sentence of an episode is not the sentence of its frames", "mend `tasks` by hand"
    ),
    "file-order": Problem(
        "lerobot joins data files by name: their order must be the order of episodes", "rename the files"
    ),
    "statistics": Problem("policies are normalised with meta/stats.json", _FIX, ERROR, True),
    "episode-statistics": Problem(
        "lerobot builds a merged dataset's statistics from those of its episodes", _FIX, ERROR, True
    ),
    # --- rows ---
    "columns": Problem("a column is not what meta/info.json declares", _WRITER),
    "row-count": Problem("rows and frames of other episodes are taken for this one's", _AGAIN),
    "index": Problem("lerobot finds row i of the dataset by position", _FIX, ERROR, True),
    "episode-index": Problem("frames are attributed to another episode, and to its video", _FIX, ERROR, True),
    "frame-index": Problem("frames of an episode are out of order, or missing", _FIX, ERROR, True),
    "timestamp": Problem("lerobot finds the frame of a row by its time, to 0.1 ms", _FIX, ERROR, True),
    "task-index": Problem(
        "frames carry another instruction, or none", "mend task_index from the episodes' tasks"
    ),
    # --- numbers ---
    "not-finite": Problem(
        "one NaN makes every weight of a policy NaN", "leave the episode out, or record it again"
    ),
    "constant": Problem("a sensor that says nothing, or was never connected", "leave the episode out", WARN),
    "stale": Problem(
        "a sensor stood still while the robot was commanded to move", "leave the episode out", WARN
    ),
    "jump": Problem("two recordings were joined, or the robot was carried", "cut the episode there", WARN),
    "action-is-state": Problem(
        "a policy that repeats its input is perfect on such data", "take the next state as action", WARN
    ),
    "time-pairing": Problem(
        "actions stand beside observations that already show their effect, or that are long past",
        "shift the column against the rows, in the raw data, and convert again",
    ),
    "gripper-range": Problem(
        "one dataset, two conventions: the gripper's meaning is a coin toss", "convert one side"
    ),
    "gripper-polarity": Problem(
        "what one episode calls open the others call closed", "negate it, and convert again"
    ),
    "units": Problem(
        "one episode is measured in other units than the rest", "convert its numbers, or leave it out"
    ),
    "rotation": Problem("not a rotation: losses and geometry on it mean nothing", "leave the episode out"),
    # --- words ---
    "instruction": Problem(
        "a language-conditioned policy learns the words as they stand", "mend the task table", WARN
    ),
    # --- the same twice ---
    "duplicate-episode": Problem("an episode that is there twice counts twice", "drop one of them", WARN),
    "split-leakage": Problem("a policy is judged on what it was trained on", "drop them from one split"),
    "episode-length": Problem(
        "an episode of one frame has no action to learn", "leave the episode out", WARN
    ),
    # --- video ---
    "video-size": Problem(
        "readers allocate by the declared size", "mend `shape` in meta/info.json, or encode again"
    ),
    "video-rate": Problem(
        "frames are found by time: another rate gives other frames", "encode at the dataset's fps"
    ),
    "video-count": Problem("pictures drift away from their rows", "convert the recording again"),
    "video-range": Problem(
        "rows are shown the frames of another episode", "mend from_timestamp and to_timestamp"
    ),
    "video-info": Problem(
        "encoders are chosen by what meta/info.json says of the stream", "mend `info`", WARN
    ),
    "video-damaged": Problem("a sample of the video cannot be decoded", _AGAIN),
    "video-black": Problem("the camera was off or covered", "leave the episode out"),
    "video-frozen": Problem("the camera stood still while the robot moved", "leave the episode out"),
    "video-repeated": Problem("one video stands for two cameras or two episodes", "find the right one"),
    "video-swapped": Problem("one camera's video is filed under another's name", "exchange the two videos"),
    "video-shifted": Problem(
        "pictures are early or late against their rows", "shift the video, and convert again"
    ),
    # --- our own folder ---
    "manifest": Problem("the recipe of the dataset cannot be trusted", "run the same convert again"),
    "content": Problem(
        "rows are no longer those that were converted", "convert again: targets are bound to contents"
    ),
    "own-table": Problem("dpipe/ and meta/ speak of different episodes", "run the same convert again"),
    "sidecar": Problem("columns beside the dataset do not fit its rows", "convert again"),
    "segments": Problem("words stand outside the frames they speak of", "convert again"),
    "dropped": Problem("episodes were left out without a record of why", "convert again", WARN),
    "card": Problem("Hugging Face datasets cannot open the folder without it", "convert again", WARN),
    "target": Problem("a target that is not whole cannot be looked up", "dpipe precompute STAGE"),
    "target-contract": Problem(
        "a target made under other terms teaches something else", "dpipe precompute STAGE"
    ),
    "target-episodes": Problem(
        "episodes without targets, or with another episode's", "dpipe precompute STAGE"
    ),
    "target-values": Problem("targets that are not finite, or beyond their range", "dpipe precompute STAGE"),
    "shards": Problem(
        "shards that are damaged or old are refused in the middle of a run", "dpipe precompute shards"
    ),
    # --- raw recordings ---
    "gap": Problem("frames are missing between two that are paired", "fetch the missing frames"),
    "misplaced": Problem("a file lies where another kind belongs", "move it to its own folder"),
    "contradiction": Problem("two columns that must agree do not", "replay or download the recording again"),
    "other": Problem("the converter left it out", "see the reason"),
}

# A converter's sentence -> the problem's name; the first that fits.
_SENTENCES: tuple[tuple[str, str], ...] = (
    (r"refused|leaves its folder|encrypted|another file", "refused"),
    (r"not finite|are NaN", "not-finite"),
    (r"is no rotation|does not end in the row|quaternion", "rotation"),
    (r"wrong suite folder|is no LIBERO suite|belongs? to another", "misplaced"),
    (r"frame rate|frames a second|\bfps\b", "video-rate"),
    (r"observations are taken", "time-pairing"),
    (r"gripper (action|command|readings)|beyond \[-1, 1\]", "gripper-range"),
    (r"single colour|black", "video-black"),
    (r"the video has \d+ frames|video .*frames|frames of video|\.mp4 has \d+ frames", "video-count"),
    (
        r"lengths differ|has \d+ rows|num_samples|has \d+ frames, transforms|"
        r"attribute (total|num_demos)|rows? .*expected",
        "row-count",
    ),
    (r"not the next frame's pose|rel_actions other than|disagree|is not 'ee_pos' followed", "contradiction"),
    (r"frames? missing|is missing|are missing|no such file|no video|lacks? ", "missing-file"),
    (r"no (language )?windows?|holds no frame|leaves its play episode|lies in no play episode", "segments"),
    (r"no scene is known|lie in scenes", "contradiction"),
    (r"no steps|no frames?\b|frame left|leave none with a next state", "episode-length"),
    (
        r"has shape|has \(|expected .*floating|is (float|u?int|bool)\d*[ ,(]|differ in size|cameras differ",
        "columns",
    ),
    (r"missing '|^missing |no group|no dataset|no entry", "columns"),
    (r"expected <number>|lists no play episode|holds no demo", "layout"),
    (
        r"cannot be|not a readable|damaged|cut short|unreadable|checksum|ends? (in the middle|early|after)|"
        r"not an MP4|no table|no video track|claims|zip|npy|pickle|no uncompressed tar|not JSON|holds other than",
        "unreadable",
    ),
    (r"instruction|annotation|bddl says|attribute task says", "instruction"),
)
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), name) for pattern, name in _SENTENCES)


def sentences_of(reason: str) -> list[str]:
    """The sentences of a converter's reason: its first line, parted at semicolons; what merely explains stays on."""
    sentences: list[str] = []
    for part in (reason.splitlines() or [""])[0].split("; "):
        if sentences and part.startswith(("refused", "found:", "expected", "use ", "fetch ", "--")):
            sentences[-1] += f"; {part}"
        elif part.strip():
            sentences.append(part)
    return sentences


def problems_of(reason: str) -> tuple[str, ...]:
    """The names in a converter's reason, one a sentence."""
    return tuple(dict.fromkeys(problem_of(sentence) for sentence in sentences_of(reason))) or ("other",)


def problem_of(sentence: str) -> str:
    return next((name for pattern, name in _PATTERNS if pattern.search(sentence)), "other")
