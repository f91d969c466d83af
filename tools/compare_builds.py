# SPDX-License-Identifier: Apache-2.0
"""Compare two builds of gemma4 to the bit: `exact` logits, every site, generation with a seed, encoders, saved files.

    python tools/compare_builds.py BASE NEW [--only GLOB]

BASE and NEW are folders that hold the package (what `pip install --no-deps --target` made) or Python interpreters that
have it, an editable install for example. Each build runs in a process of its own over the same files: the shipped
models, their quantised copies (BASE makes them), and every random variant of tests/reference (the Python that runs this
makes them: it needs the `test` extra). Sequences that BASE saved are restored by NEW.

Prints each case in which something differs, with its first differing site in forward order and by how much. Exit status
1 if anything differs, or is no longer there; sites and cases that only NEW has are listed and are no difference.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("tiny-e", "tiny-moe")
QUANTISED = ("Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "Q4_K_M")
PROMPTS = (
    "When Mary and John went to the store, John gave a book to",
    "Once upon a time there was a little",
    "1 2 3 4 5",
)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
KV_DTYPES = ("f32", "f16", "bf16")
FRAMES, SIDES = (1, 13, 203), ((1, 1), (2, 3), (5, 4), (12, 9))  # sound in frames; pictures in pooled patches
DECODED = 6  # tokens one by one after a prompt

Results = dict[str, np.ndarray]
Case = tuple[str, Callable[[], Results]]


# ---- the files: written once, by the process that compares -----------------------------------------------------------


def write_files(folder: Path, base: Build) -> None:
    """Every checkpoint, and plan.json: what to run on each."""
    sys.path.insert(0, str(ROOT / "tests"))
    from reference import towers, variants
    from transformers.utils import logging

    logging.disable_progress_bar()
    plan: dict[str, Any] = {"text": [], "media": [], "shipped": list(SHIPPED)}
    for variant in variants.VARIANTS:
        variants.save(variant, variants.build(variant), folder / variant.name)
        lengths = sorted({1, variant.window + 1, max(variant.prompt_lengths)})
        prompts = [variants.token_ids(variant, n).tolist() for n in lengths]
        plan["text"].append({"name": variant.name, "prompts": prompts})
    for tower in towers.TOWERS:
        towers.save(tower, towers.build(tower), folder / tower.name)
        plan["media"].append({"name": tower.name} | _media_of(towers, tower, folder))
    for name in SHIPPED:
        for kind in QUANTISED:
            base.run("--quantize", name, str(folder / f"{name}-{kind}.gguf"), kind)
            plan["shipped"].append(f"{name}-{kind}.gguf")
    (folder / "plan.json").write_text(json.dumps(plan))


def _media_of(towers: Any, tower: Any, folder: Path) -> dict[str, list[str]]:
    """The tower's inputs, as files of arrays."""
    found: dict[str, list[str]] = {"vision": [], "audio": []}
    if tower.vision is not None:
        pool = tower.vision.get("pooling_kernel_size", 3) if not tower.unified else 1
        for width, height in SIDES:
            rows, positions = towers.image(tower, width * pool, height * pool)
            path = folder / f"{tower.name}-{width}x{height}.npz"
            np.savez(path, rows=rows, positions=positions)
            found["vision"].append(path.name)
    if tower.audio is not None:
        for frames in FRAMES:
            path = folder / f"{tower.name}-{frames}.npz"
            np.savez(path, rows=towers.mel(tower, frames))
            found["audio"].append(path.name)
    return found


# ---- one build: runs in a process of its own, with the public names of the package only ----------------------------


def cases(folder: Path, build: str) -> Iterator[Case]:
    plan = json.loads((folder / "plan.json").read_text())
    for entry in plan["text"]:
        name = entry["name"]
        yield from _loaded(name, _text_cases(folder, build, name, folder / name, entry["prompts"]))
    for entry in plan["media"]:
        yield from _loaded(entry["name"], _media_cases(folder, entry))
    for name in plan["shipped"]:
        yield from _loaded(name, _shipped_cases(folder, build, name))


def _loaded(name: str, found: Iterator[Case]) -> Iterator[Case]:
    """The cases of a checkpoint; one that fails, if this build cannot load it."""
    try:
        yield from found
    except Exception as problem:
        yield f"{name}/load", partial(_fail, problem)


def _fail(problem: Exception) -> Results:
    raise problem


def _shipped_cases(folder: Path, build: str, name: str) -> Iterator[Case]:
    path = folder / name if name.endswith(".gguf") else name
    with _load(path) as model:
        prompts = [model.to_tokens(text).tolist() for text in PROMPTS]
    yield from _text_cases(folder, build, name, path, prompts)
    yield from _generation_cases(name, path)


def _load(path: Path | str) -> Any:
    import gemma4

    return gemma4.load(path, precision="exact", threads=2)


def _text_cases(folder: Path, build: str, name: str, path: Path | str, prompts: list[list[int]]) -> Iterator[Case]:
    try:
        model = _load(path)
    except NotImplementedError:  # a model that this build does not know yet: cases that only the other one has
        return
    for ids in prompts:
        yield f"{name}/prompt of {len(ids)}", lambda ids=ids: _captured(*model.run_with_cache(ids, "*"))
    longest = max(prompts, key=len)
    yield f"{name}/three prompts", lambda: _together(model, [longest, prompts[0], longest[::-1]])
    for kv_dtype in KV_DTYPES:
        yield f"{name}/decoding, {kv_dtype}", lambda kv=kv_dtype: _decoded(model, longest, kv)
    yield f"{name}/saved and restored", lambda: _restored(model, longest, folder, f"{name}.npz", build)
    for seed in (0, 1):
        options = {"max_tokens": 20, "temperature": 0.8, "top_k": 20, "seed": seed, "stop_ids": ()}
        yield f"{name}/ids generated, seed {seed}", lambda o=options: _generated(model.generate(longest[:9], **o))
    model.close()


def _captured(logits: Any, cache: Any) -> Results:
    return {name: np.asarray(array) for name, array in cache.items()} | {"logits": logits}


def _together(model: Any, prompts: list[list[int]]) -> Results:
    return {f"logits of prompt {i}": logits for i, logits in enumerate(model.forward(prompts))}


def _decoded(model: Any, ids: list[int], kv_dtype: str) -> Results:
    sequence = model.new_sequence(kv_dtype=kv_dtype)
    found = {"prompt": model.forward(ids, sequence=sequence, logits="last")}
    for i, token in enumerate(ids[:DECODED]):
        found[f"token {i}"] = model.forward([token], sequence=sequence)
    return found


def _restored(model: Any, ids: list[int], folder: Path, file: str, build: str) -> Results:
    """What follows a sequence that the base build saved: the new one reads the old one's file."""
    if build == "base":
        sequence = model.new_sequence()
        model.forward(ids, sequence=sequence, logits=None)
        sequence.save(folder / f"saved-{file}")
    return {"continued": model.forward(ids[:3], sequence=model.restore(folder / f"saved-{file}"))}


def _generated(generation: Any) -> Results:
    text = generation.text or ""
    found = {"ids": np.asarray(generation.tokens), "text": np.frombuffer(text.encode(), np.uint8)}
    cache = getattr(generation, "cache", None)
    return found | ({} if cache is None else _captured(np.zeros(0), cache))


def _generation_cases(name: str, path: Path | str) -> Iterator[Case]:
    model = _load(path)
    for seed in (0, 1, 2):
        options = {"max_tokens": 40, "temperature": 1.0, "top_p": 0.95, "seed": seed}
        yield f"{name}/story, seed {seed}", lambda o=options: _generated(model.generate(PROMPTS[1], **o))
        yield f"{name}/chat, seed {seed}", lambda o=options: _generated(model.generate(CHAT, **o))
    watched = {"max_tokens": 20, "temperature": 0.0, "capture": "blocks.*"}
    yield f"{name}/generation watched", lambda: _generated(model.generate(PROMPTS[0], **watched))
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    sound = np.random.default_rng(1).standard_normal(16000).astype(np.float32) / 8
    for kind, medium in (("image", picture), ("audio", sound)):
        if not getattr(model.modalities, kind):
            continue
        messages = [
            {"role": "user", "content": [{"type": kind, kind: medium}, {"type": "text", "text": "What is this?"}]}
        ]
        yield f"{name}/{kind}", lambda m=messages: _generated(model.generate(m, max_tokens=12, temperature=0))
    model.close()


def _media_cases(folder: Path, entry: dict[str, Any]) -> Iterator[Case]:
    model = _load(folder / entry["name"])
    for modality in ("vision", "audio"):
        media = [_medium(folder / name) for name in entry[modality]]
        if media:
            yield f"{entry['name']}/{modality}", lambda e=modality, m=media: _encoded(getattr(model, e), m)
    model.close()


def _medium(path: Path) -> Any:
    with np.load(path) as file:
        return (file["rows"], file["positions"]) if "positions" in file else file["rows"]


def _encoded(encoder: Any, media: list[Any]) -> Results:
    soft, caches = encoder.run_with_cache(media, "*")
    found = {f"{name} of {i}": array for i, cache in enumerate(caches) for name, array in cache.items()}
    return found | {f"soft tokens of {i}": array for i, array in enumerate(soft)}


def digest(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()[:16]


def import_from(place: str) -> None:
    """Let `import gemma4` find the package in the folder `place`, also where an editable install would come first."""
    import importlib.machinery as machinery

    if not (Path(place) / "gemma4" / "__init__.py").is_file():
        raise SystemExit(f"{place} is neither an interpreter nor a folder with the package gemma4")
    plain = (machinery.BuiltinImporter, machinery.FrozenImporter, machinery.PathFinder)
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder in plain]
    sys.path.insert(0, place)


def probe(folder: Path, build: str, only: str, save: Path | None) -> None:
    """One JSON line for each case: its name, and the digest of every array; or, with `save`, the arrays themselves."""
    import gemma4

    print(json.dumps({"package": str(Path(gemma4.__file__).parent), "isa": gemma4.cpu_info()["isa"]}), flush=True)
    for name, run in cases(folder, build):
        if not fnmatch.fnmatchcase(name, only):
            continue
        try:
            found, error = run(), None
        except Exception as problem:  # what it cannot do any more is a difference like any other
            found, error = {}, f"{type(problem).__name__}: {problem}"
        if save is not None:
            np.savez(save, **{key.replace("/", " "): array for key, array in found.items()})
        digests = {key: digest(array) for key, array in found.items()}
        print(json.dumps({"case": name, "digests": digests, "error": error}), flush=True)


# ---- both builds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """A folder with the package, or an interpreter."""

    label: str
    where: Path

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        """The tool itself in a process of this build; its JSON lines."""
        installed = self.where.is_file()
        python, place = (str(self.where), "") if installed else (sys.executable, str(self.where))
        command = [python, "-P", str(Path(__file__).resolve()), "--in", place, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.label} ({self.where}): exit status {done.returncode}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def probe(self, folder: Path, only: str, save: Path | None = None) -> tuple[str, dict[str, dict[str, Any]]]:
        """The folder that was imported, and each case's answer."""
        extra = [str(save)] if save else []
        head, *lines = self.run("--probe", str(folder), self.label, only, *extra)
        return f"{head['package']} ({head['isa']})", {line["case"]: line for line in lines}


def how_far(base: Build, new: Build, folder: Path, case: str, key: str) -> str:
    """The largest difference in one array of one case, in words."""
    arrays = []
    for build in (base, new):
        path = folder / f"differing-{build.label}.npz"
        build.probe(folder, case.replace("[", "[[]"), save=path)
        with np.load(path) as file:
            arrays.append(file[key.replace("/", " ")])
    ours, theirs = arrays
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {ours.shape} became {theirs.dtype} {theirs.shape}"
    wide = [array.astype(np.float64) for array in arrays]
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.abs(wide[0] - wide[1])).max(initial=0)
    return f"{(ours != theirs).mean():.1%} of the values, by {gap:.3g} at most of {np.abs(wide[0]).max(initial=0):.3g}"


def differences(base: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Keys of one case that differ or are gone, and those that are new."""
    ours, theirs = base["digests"], new["digests"]
    return [key for key in ours if theirs.get(key) != ours[key]], [key for key in theirs if key not in ours]


def compare(base: Build, new: Build, folder: Path, only: str) -> int:
    (place, before), (new_place, after) = base.probe(folder, only), new.probe(folder, only)
    print(f"base: {place}\nnew:  {new_place}")
    n_bad, added = 0, {case for case in after if case not in before}
    for case, answer in before.items():
        lost = after.get(f"{case.rpartition('/')[0]}/load", {"digests": {}, "error": "no such case"})
        other = after.get(case, lost)
        bad, fresh = differences(answer, other)
        if answer["error"]:  # nothing to compare with
            print(f"{case}: the base build fails ({answer['error']})")
            continue
        added |= {f"{case}: {key}" for key in fresh} if not other["error"] else set()
        if other["error"]:
            print(f"{case}: fails: {other['error']}")
        elif bad:
            gone = [key for key in bad if key not in other["digests"]]
            what = "is gone" if bad[0] in gone else how_far(base, new, folder, case, bad[0])
            print(f"{case}: {len(bad)} of {len(answer['digests'])} differ, first {bad[0]}: {what}")
        n_bad += bool(bad)
    n_arrays = sum(len(answer["digests"]) for answer in before.values())
    print(f"{len(before)} cases, {n_arrays} arrays: {n_bad} cases differ; only the new build has {len(added)} things")
    for name in sorted(added)[:20]:
        print(f"  new: {name}")
    return 1 if n_bad or not before else 0


def run_as_build(place: str, what: str, *arguments: str) -> int:
    """What `Build.run` starts."""
    if place:
        import_from(place)
    if what == "--quantize":
        import gemma4

        source, target, kind = arguments
        gemma4.quantize(source, target, type=kind)
    else:
        folder, build, only, *save = arguments
        probe(Path(folder), build, only, Path(save[0]) if save else None)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--in"]:
        return run_as_build(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder with the package, or a Python interpreter")
    parser.add_argument("new", type=Path, help="the same")
    parser.add_argument("--only", default="*", metavar="GLOB", help='cases to run: "tiny-e/*", "*/vision"')
    parser.add_argument("--files", type=Path, help="keep the checkpoints here, and use them if they are there")
    args = parser.parse_args()
    base, new = Build("base", args.base.absolute()), Build("new", args.new.absolute())
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.files or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "plan.json").exists():
            write_files(folder.absolute(), base)
        return compare(base, new, folder.absolute(), args.only)


if __name__ == "__main__":
    sys.exit(main())
