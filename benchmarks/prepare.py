"""From text to batches: `python -m benchmarks.prepare --tokenizer FOLDER` prints the rates and the memory.

Tales are written to a file of `--megabytes` (5,000 make about a billion tokens), each under a number of its own, so
that no two are equal. That file and one of a tenth are prepared, each in a process of its own whose peak memory is
taken: if memory is bounded, the two are alike. On one core the tenth shows the rate of a core. Then the time that a
training step would wait for its batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from gemlet.config import TrainConfig
from gemlet.data import TokenStream, batch
from gemlet.tales import stories

PREPARE = """
import json, os, resource, sys, time
corpus, out, tokenizer, cores = sys.argv[1:]
if int(cores):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
from gemlet.config import DataConfig
from gemlet.prepare import load_meta, prepare
start = time.perf_counter()
prepare(DataConfig(source=corpus, tokenizer=tokenizer), out, vocab_size=0)
seconds = time.perf_counter() - start
tokens = sum(split.tokens for split in load_meta(out).splits.values())
print(json.dumps([tokens, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def write_tales(file: Path, megabytes: int) -> None:
    """Twenty thousand tales again and again, numbered through."""
    tales = cycle(list(islice(stories(), 20_000)))
    size = 0
    with file.open("w", encoding="utf-8") as out:
        for number, tale in enumerate(tales):
            size += out.write(f"{number}. {tale}\n<|endoftext|>\n")
            if size >= megabytes * 10**6:
                return


def prepared(corpus: Path, out: Path, tokenizer: str, cores: int = 0) -> None:
    command = [sys.executable, "-c", PREPARE, str(corpus), str(out), tokenizer, str(cores)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    tokens, seconds, memory = json.loads(done.stdout)
    where = f"{cores} core" if cores else f"all {len(os.sched_getaffinity(0))} cores"
    print(
        f"{corpus.stat().st_size / 1e6:,.0f} MB, {tokens / 1e6:,.1f} M tokens, {where}: {tokens / seconds / 1e6:.2f} M "
        f"tokens/s, {seconds:.1f} s, at most {memory:.0f} MB of memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if it is left out")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_tales(folder / "tales.txt", flags.megabytes)
        write_tales(folder / "tenth.txt", flags.megabytes // 10)
        print(f"tales written in {time.perf_counter() - start:.0f} s")
        prepared(folder / "tenth.txt", folder / "one", flags.tokenizer, cores=1)
        prepared(folder / "tenth.txt", folder / "tenth", flags.tokenizer)
        prepared(folder / "tales.txt", folder / "whole", flags.tokenizer)
        stream = TokenStream.open(folder / "whole", "train")
        for rows, length in ((8, 256), (32, 512), (4, 4096)):
            config = TrainConfig(batch_size=rows, sequence_length=length, micro_batch_size=rows)
            times = []
            for step in range(500):
                start = time.perf_counter()
                batch(stream, config, step)
                times.append((time.perf_counter() - start) * 1e3)
            first, *times = times
            print(
                f"a batch of {rows} x {length}: {statistics.median(times):.3f} ms, at most {max(times):.2f}, "
                f"the first of an epoch {first:.1f}"
            )


if __name__ == "__main__":
    main()
