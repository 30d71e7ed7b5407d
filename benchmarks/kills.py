"""Builds that are killed with SIGKILL in each of their stages, and what is left of them: the kill table.

    python benchmarks/kills.py --work /tmp/kills [--kills 120] [--at-once 1]

Builds the package of the tests once without a break, and then many times from the beginning of each stage; each of these builds is killed several
times in that stage while it resumes, and ends in a run that is not killed. A kill comes after a random share of the time that the stage takes, or
right behind a random change of a file's name. The parent alone gets the signal. Ends when every stage has its share of the kills, whatever else
the machine does meanwhile. Prints Markdown and writes it to benchmarks/kills.md, after each build. The same command goes on with a run that was
broken off.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from page import command_line, measured_here, publish

if TYPE_CHECKING:
    from killing import Kill, Series

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
PER_SERIES = 10
LEAST = 20  # kills in each stage


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder, with room for 300 MB, or that of an earlier run")
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--at-once", type=int, default=1, help="builds at once")
    arguments = parser.parse_args()
    from killing import CHECKS, STAGES, Kill, Killer, Series
    from oracle import write_base

    arguments.work.mkdir(parents=True, exist_ok=True)
    record = arguments.work / "series.jsonl"
    made: list[Series] = []
    for line in record.read_text().splitlines() if record.exists() else []:
        saved = json.loads(line)
        made.append(Series(**{**saved, "kills": [Kill(**kill) for kill in saved["kills"]]}))
    root = Path(tempfile.mkdtemp(dir=arguments.work))
    killer = Killer(root, write_base(root / "base"))

    def series(number: int, stage: str, kills: int) -> None:
        made.append(done := killer.series(f"series-{number}", [stage] * kills, random.Random(number)))
        with record.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")
        publish(page(made), arguments.output)

    while True:
        counts = Counter(kill.stage for one in made for kill in one.kills)
        short = {stage: LEAST - counts[stage] for stage in (CHECKS, *STAGES) if counts[stage] < LEAST}
        if not short and counts.total() >= arguments.kills:
            break
        wanted = short or dict.fromkeys((CHECKS, *STAGES), PER_SERIES)
        with ThreadPoolExecutor(arguments.at_once) as pool:
            numbers = range(len(made), len(made) + len(wanted))
            list(pool.map(series, numbers, wanted, [min(kills, PER_SERIES) for kills in wanted.values()]))


def page(made: list[Series]) -> list[str]:
    """The table: a row for each place in which kills came, and one for all."""
    from killing import BETWEEN, CHECKS, STAGES

    kills: dict[str, list[tuple[Kill, Series]]] = defaultdict(list)
    for one in made:
        for kill in one.kills:
            kills[kill.stage].append((kill, one))
    lines = [
        "# Kills",
        "",
        measured_here(__file__),
        "",
        f"The parent of a build got SIGKILL {sum(map(len, kills.values()))} times, in {len(made)} builds of a small package",
        "(train, export, Modelfiles, deploy to a double of a server, compare); each build was resumed, killed again, and at last left to end. A kill",
        "was aimed at a stage: at a random share of the time that the stage takes, or, as the third column counts, right behind a change of a",
        "file's name. Those that came when the stage was over already are between stages. A file is broken if it has its final name and is not, byte",
        "for byte, that of a build without a kill. Unfinished files have temporary names; the next start removes them. The last but one column",
        "compares adapter, GGUFs, Modelfiles and the models on the server with those of a build without a kill.",
        "",
        "| killed in | kills | at a file | workers | alive 1 s later | broken files | unfinished files | resumed, same digests | left at the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for place in (CHECKS, *STAGES, BETWEEN, "all"):
        rows = [pair for name, pairs in kills.items() if place in (name, "all") for pair in pairs]
        same = sum(one.same and one.code == 0 for _, one in rows)
        numbers = (
            len(rows),
            sum(kill.at_a_file for kill, _ in rows),
            sum(kill.workers for kill, _ in rows),
            sum(kill.alive for kill, _ in rows),
            sum(kill.broken for kill, _ in rows),
            sum(kill.unfinished for kill, _ in rows),
        )
        left = len({name for _, one in rows for name in one.left})
        lines.append(f"| {place} | {' | '.join(map(str, numbers))} | {same} of {len(rows)} | {left} |")
    return lines


if __name__ == "__main__":
    main()
