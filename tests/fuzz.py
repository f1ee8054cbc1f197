"""Readers against files that a fuzzer makes up: python tests/fuzz.py TARGET --minutes 10 --seed 1

    checkpoint   read_checkpoint and Writer.load; archives are put together anew after a change, so
                 that it gets past the checksums and into the pickle
    corpus       a text file, its pieces, its tokens; against Python's own decoding
    config       YAML through `base:` and the real parser of `fit`
    bytes        not a fuzzer: each byte of a small checkpoint changed twice, and the file cut short
                 at every kilobyte and at each of its last two hundred bytes

A finding is any exception but a ValueError with a message, a wrong result, a crash, an input that
takes 20 seconds or 2 GB. Coverage-guided by atheris (pip install atheris).
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TARGETS = ("checkpoint", "corpus", "config", "bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON list, to which the run is added")
    parser.add_argument("--inputs", type=Path, help="keeps what was found worth keeping")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        fuzz(args.target, args.child)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = exhaust(args.seed, Path(folder)) if args.target == "bytes" else campaign(args, folder)
    seconds = time.monotonic() - started
    run = {"target": args.target, "seed": args.seed, "hours": round(seconds / 3600, 4), **run}
    print(
        f"{args.target}: {run['executions']:,} executions in {run['hours']} hours, seed "
        f"{args.seed}, {len(run['findings'])} findings"
    )
    for finding in run["findings"]:
        print(finding)
    if args.out:
        runs = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*runs, run], indent=1) + "\n")
    return bool(run["findings"])


# --- the parent: one process after the other until the time is up ---------------------------------


def campaign(args: argparse.Namespace, folder: str) -> dict:
    work = Path(folder)
    inputs = args.inputs or work / "inputs"
    for path in (inputs, work / "seeds", work / "findings"):
        path.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(SEEDS[args.target]()):
        (work / "seeds" / str(i)).write_bytes(data)
    end, executions, seed, findings = time.monotonic() + 60 * args.minutes, 0, args.seed, []
    while (left := int(end - time.monotonic())) > 0:
        options = [f"-max_total_time={left}", f"-seed={seed}", "-timeout=20", "-rss_limit_mb=2048"]
        options += ["-report_slow_units=20"]
        options += ["-max_len=65536", "-print_final_stats=1", f"-artifact_prefix={work}/findings/"]
        command = [sys.executable, __file__, args.target, "--child", folder]
        env = os.environ | {"FUZZ": " ".join([*options, str(inputs), f"{work}/seeds"])}
        ended = subprocess.run(command, env=env, stderr=subprocess.PIPE, errors="replace")
        if "No module named 'atheris'" in ended.stderr:
            sys.exit("error: atheris is missing: pip install atheris")
        done = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)\b", ended.stderr, re.MULTILINE)
        executions += max((int(a or b) for a, b in done), default=0)
        if ended.returncode:
            findings.append({"exit": ended.returncode, "said": ended.stderr[-1500:]})
            if len(findings) > 20:
                break
        seed += 1
    for path in sorted((work / "findings").iterdir()):
        data = path.read_bytes()
        findings.append({"name": path.name, "hex": data.hex()[:20_000], "bytes": len(data)})
    return {"executions": executions, "findings": findings}


# --- the child: the fuzzer itself -----------------------------------------------------------------


def fuzz(target: str, work: Path) -> None:
    import atheris
    import torch  # noqa: F401  not to be traced

    with atheris.instrument_imports(include=["gpt_lightning", "pickletools", "yaml"]):
        check = CHECKS[target](work)

    def one(data: bytes) -> None:
        try:
            check(data)
        except Exception as error:  # goes on: a campaign should find more than one
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__}-{Path(where.filename).stem}-{where.lineno}"
            path = work / "findings" / name
            if not path.exists():
                path.write_bytes(data)
                traceback.print_exc()

    options = os.environ["FUZZ"].split()
    mutator = {"custom_mutator": mutate} if target == "checkpoint" else {}
    atheris.Setup([sys.argv[0], *options], one, **mutator)
    atheris.Fuzz()


def refuses(read, *args):
    """What `read` returns, or None where it refuses, which has to be by a ValueError."""
    try:
        return read(*args)
    except ValueError as error:
        message = str(error)
        assert message and type(error) not in (UnicodeDecodeError, json.JSONDecodeError), message
        assert len(message) < 2000, message
    return None


def check_checkpoint(work: Path):
    import torch

    from gpt_lightning.checkpoint import KEY, read_checkpoint
    from gpt_lightning.config_files import stored_settings
    from gpt_lightning.generation.writer import Writer

    path = work / "a.ckpt"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = refuses(read_checkpoint, path)
        if found is None:
            return
        assert all(isinstance(part, torch.Tensor) for part in found["state_dict"].values())
        refuses(lambda: stored_settings(found[KEY].get("config") or "", {}))
        writer = refuses(lambda: Writer.load(path, precision="fp32"))
        if writer is not None:
            refuses(lambda: writer.write("a", max_new_tokens=2))

    return check


def check_corpus(work: Path):
    from gpt_lightning.data.corpora import find_corpus
    from gpt_lightning.data.tokens import prepare_tokens

    path, count = work / "text.txt", 0

    def expected(data: bytes) -> str | None:
        if b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return None
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return None
        return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n") or None

    def check(data: bytes) -> None:
        nonlocal count
        size, data, count = data[0] % 17 + 1 if data else 1, data[1:], count + 1
        path.write_bytes(data)
        corpus = refuses(find_corpus, str(path))
        text = refuses(lambda: "".join(corpus.chunks(size))) if corpus else None
        assert text == expected(data), "another text"
        if text is None or count % 16:
            return
        for kind in ("char", "byte"):
            found = prepare_tokens(corpus, kind, cache=work / "cache")
            assert found.tokenizer.decode(found.open()) == text, f"other tokens ({kind})"
        for old in (work / "cache").iterdir():
            old.unlink()

    return check


def check_config(work: Path):
    from gpt_lightning.config_files import load_yaml
    from gpt_lightning.lightning_cli import GPTCLI, quiet

    class ParserOnly(GPTCLI):
        def parse_arguments(self, parser, args):
            raise Made(self, parser)

    quiet()
    try:
        ParserOnly(["fit"], "", None, None)
    except Made as made:
        cli, parser = made.args
    path = work / "a.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        cli.argv = ["fit", "--config", str(path)]
        refuses(lambda: load_yaml(data.decode("utf-8", "replace")))
        refuses(cli._parse, parser, cli.argv)

    return check


class Made(Exception):
    """The parser, on its way out of LightningCLI."""


CHECKS = {"checkpoint": check_checkpoint, "corpus": check_corpus, "config": check_config}


# --- seeds, and what is done to them --------------------------------------------------------------


def checkpoint_seeds():
    from crafted import FILES, good, saved

    for name in ("gpt", "lecture", "bigram"):
        yield saved(good(name))
    for make in FILES.values():
        if len(data := make(good())) < 50_000:
            yield data


def corpus_seeds():
    for text in (
        "To be,\r\nor not\rto be\n",
        "Ob's edler im Gemüt",
        "\ufeff漢字😀\r",
        "\r\r\n\n\r",
        "",
    ):
        yield b"\3" + text.encode()
    yield b"\1" + "a\r\n".encode("utf-16")
    yield b"\2\xf0\x9f\x98"


def config_seeds():
    root = Path(__file__).parent.parent
    for path in sorted((root / "configs").rglob("*.yaml")):
        yield path.read_bytes()
    yield b"a: &a [1, 2]\nb: {<<: {c: *a}}\ntrainer: {max_steps: 1e3, callbacks: null}\n"
    yield b"trainer:\n  callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]\n"


SEEDS = {"checkpoint": checkpoint_seeds, "corpus": corpus_seeds, "config": config_seeds}


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Another file: mostly an archive put together anew around a pickle with something changed."""
    import atheris
    from crafted import entries, packed

    draw = random.Random(seed)
    try:
        parts = entries(data) if draw.random() < 0.9 else {}
    except Exception:  # of zipfile, for what is no archive
        parts = {}
    if "data.pkl" not in parts:
        return atheris.Mutate(data, max_size)
    old, kind = parts["data.pkl"], draw.random()
    if kind < 0.5:
        parts["data.pkl"] = mutate_opcodes(old, draw)
    elif kind < 0.9:
        parts["data.pkl"] = atheris.Mutate(old, len(old) + 64)
    else:
        name = draw.choice(list(parts))
        parts[name] = atheris.Mutate(parts[name] or b"\0", len(parts[name]) + 16)
    return packed(parts)[:max_size]


def mutate_opcodes(data: bytes, draw: random.Random) -> bytes:
    """A pickle with a run of opcodes removed, repeated, moved, or a number or a name changed."""
    import pickletools

    try:
        places = [at for _, _, at in pickletools.genops(data)]
    except Exception:
        return data + b"."
    codes = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    at, n = draw.randrange(len(codes)), draw.choice([1, 1, 1, 2, 3, 8])
    run, to = codes[at : at + n], draw.randrange(len(codes))
    match draw.randrange(5):
        case 0:
            del codes[at : at + n]
        case 1:
            codes[to:to] = run
        case 2:
            codes[to : to + n] = run
        case 3:
            numbers = [b"K\0", b"K\1", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"N", b"\x88"]
            numbers += [
                b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
                b"G\x7f\xf8" + bytes(6),
                b"]",
                b"}",
                b")",
            ]
            codes[at] = draw.choice(numbers)
        case 4:
            codes[at] = draw.choice([b"R", b"b", b"s", b"u", b"t", b"e", b"a", b"(", b"\x85", b"Q"])
    return b"".join(codes)


# --- every byte -----------------------------------------------------------------------------------


def exhaust(seed: int, folder: Path) -> dict:
    from crafted import good, saved
    from test_strangers import same

    from gpt_lightning.checkpoint import Damaged, read_checkpoint

    path, draw = folder / "a.ckpt", random.Random(seed)
    raw = saved(good(n_embd=16, n_head=2, n_layer=2))
    path.write_bytes(raw)
    content, findings, counts = read_checkpoint(path), [], {"refused": 0, "as it was": 0}
    read_checkpoint(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def attempt(what: str, data: bytes, may_be_read: bool) -> None:
        path.write_bytes(data)
        try:
            right = same(read_checkpoint(path), content) and may_be_read
            counts["as it was"] += 1
        except Damaged as error:
            right = str(error).isprintable()
            counts["refused"] += 1
        except Exception as error:
            right, what = False, f"{what}: {error!r}"
        if not right:
            findings.append(what)

    for at in range(len(raw)):
        for mask in (0xFF, 1 << draw.randrange(8)):
            changed = raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]
            attempt(f"byte {at} ^ {mask}", changed, True)
    for size in {*range(0, len(raw), 1024), *range(len(raw) - 200, len(raw)), 1, 2, 3, 29, 30, 98}:
        attempt(f"cut at {size}", raw[:size], False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{len(raw):,} bytes: {counts}, memory grew by {grown} kB")
    if grown > 32 << 10:
        findings.append(f"memory grew by {grown} kB")
    executions = sum(counts.values())
    return {"executions": executions, "findings": findings, **counts, "grown_kB": grown}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    sys.exit(main())
