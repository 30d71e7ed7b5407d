"""Builds that are killed with SIGKILL at random moments, and what is left of them: the kill table.

    python benchmarks/kills.py --work /tmp/kills [--kills 120] [--at-once 4]

Builds the package of the tests once without a break, and then many times from the beginning of each stage; each of these builds is killed several
times while it resumes, and ends in a run that is not killed. The moments are random, half of them in the processor time of the stage and half
after the checks before its work. The parent alone gets the signal. Prints Markdown and writes it to benchmarks/kills.md.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from page import command_line, publish

if TYPE_CHECKING:
    from killing import Kill, Series

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
PER_SERIES = 10
ORDER = ("checks", "train", "export", "modelfiles", "deploy", "compare")


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder, with room for 300 MB")
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--at-once", type=int, default=2, help="builds at once")
    parser.add_argument("--machine", default="", help="words about the machine and the date, for the page")
    arguments = parser.parse_args()
    from killing import STAGES, Killer
    from oracle import write_base

    arguments.work.mkdir(parents=True)
    killer = Killer(arguments.work, write_base(arguments.work / "base"))
    count = -(-arguments.kills // PER_SERIES)

    def series(number: int) -> Series:
        done = killer.series(f"series-{number}", STAGES[number % len(STAGES)], PER_SERIES, random.Random(number))
        print(number, done, file=sys.stderr, flush=True)
        return done

    with ThreadPoolExecutor(arguments.at_once) as pool:
        made = list(pool.map(series, range(count)))
    publish(page(made, arguments.machine), arguments.output)


def page(made: list[Series], machine: str) -> list[str]:
    """The table: a row for each stage in which kills came, and one for all."""
    kills: dict[str, list[tuple[Kill, Series]]] = defaultdict(list)
    for one in made:
        for kill in one.kills:
            kills[kill.stage].append((kill, one))
    lines = [
        "# Kills",
        "",
        f"{machine}. `python benchmarks/kills.py`",
        "",
        f"The parent of a build got SIGKILL {sum(map(len, kills.values()))} times, in {len(made)} builds of a small package (train, export, deploy",
        "to a double of a server, compare), at random moments; each build was resumed, killed again, and at last left to end. A file is broken if it",
        "has its final name and is not, byte for byte, that of a build without a kill. Unfinished files have temporary names; the next",
        "start removes them.",
        "",
        "| killed in | kills | workers | alive 1 s later | broken files | unfinished files | resumed, same digests | left at the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage in (*ORDER, "all"):
        rows = [pair for name, pairs in kills.items() if stage in (name, "all") for pair in pairs]
        same = sum(one.same and one.code == 0 for _, one in rows)
        numbers = (
            len(rows),
            sum(kill.workers for kill, _ in rows),
            sum(kill.alive for kill, _ in rows),
            sum(kill.broken for kill, _ in rows),
            sum(kill.unfinished for kill, _ in rows),
        )
        left = len({name for _, one in rows for name in one.left})
        lines.append(f"| {stage} | {' | '.join(map(str, numbers))} | {same} of {len(rows)} | {left} |")
    return lines


if __name__ == "__main__":
    main()
