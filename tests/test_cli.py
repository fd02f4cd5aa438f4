"""The command line as a user meets it: exit codes, messages, no tracebacks, a user's own data."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bitsandbytes.nn import Linear4bit
from minicpmv_checkpoint import int4_folder, published_folder
from PIL import Image
from safetensors.torch import load_file
from synthetic_grid import result, write

from fedmllm.cli import main
from fedmllm.data.images import ImageFile
from fedmllm.data.memes import SPEC
from fedmllm.errors import needs_package
from fedmllm.experiment import load_model
from fedmllm.models.mllm import Mllm
from fedmllm.parallel import Failure

FAST = ["training.rounds=1", "evaluation.every=0", "evaluation.conditions=[both]"]


def call(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    """Run `fedmllm words…` in this process; (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["fedmllm", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "120")
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda *words: call(monkeypatch, capsys, *words)


@pytest.fixture
def experiment(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "data: {name: memes, train: 40, test: 16}\n"
        "partition: {clients: 4}\n"
        "training: {rounds: 1}\n"
        "evaluation: {every: 0, conditions: [both]}\n"
    )
    return path


@pytest.fixture
def own(tmp_path) -> Path:
    """A user's own data: two parties with colour questions, one of them without pictures."""
    root = tmp_path / "own"
    (root / "parties").mkdir(parents=True)
    (root / "pictures").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50 + 20 * i, 40), colour).save(root / "pictures" / f"{i}.png")

    def item(i: int, image: bool) -> dict:
        mark = "<image>\n" if image else ""
        return {
            "id": i,
            "image": f"pictures/{i % 3}.png" if image else None,
            "conversations": [
                {"role": "user", "content": f"{mark}what color is it?"},
                {"role": "assistant", "content": ("red", "green", "blue")[i % 3]},
            ],
        }

    for name, image, start in (("clinic", True, 0), ("archive", False, 100)):
        rows = [item(start + i, image) for i in range(9)]
        (root / "parties" / f"{name}.json").write_text(json.dumps(rows))
    (root / "test.json").write_text(json.dumps([item(200 + i, True) for i in range(6)]))
    return root


@pytest.fixture
def own_experiment(tmp_path, own) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(
        f"data: {{name: conversations, root: {own}}}\n"
        "training: {rounds: 1, clients_per_round: 2}\n"
        "evaluation: {every: 0, conditions: [both]}\n"
    )
    return path


def test_run_report_predict(cli, experiment, tmp_path) -> None:
    out = tmp_path / "run"
    code, text, error = cli("run", experiment, "--out", out, "seed=3")
    assert (code, error) == (0, "")
    assert "round 1/1" in text
    assert json.loads((out / "result.json").read_text())["seed"] == 3
    assert (out / "report.html").read_text().startswith("<!")
    code, text, _ = cli("report", out, "--out", tmp_path / "again.html")
    assert code == 0
    assert (tmp_path / "again.html").exists()
    picture = tmp_path / "p.jpg"
    Image.new("RGB", (300, 200), "red").save(picture)
    words = ["predict", out / "adapter", "--image", picture, "--text", "only a star belongs here"]
    code, text, _ = cli(*words)
    assert code == 0
    answer, *options = [line.split() for line in text.strip().splitlines()]
    assert answer[0] in ("hateful", "not-hateful")
    assert options[0][1] == answer[0]
    assert sum(float(p) for p, _ in options) == pytest.approx(1, abs=2e-3)
    code, text, _ = cli("predict", out / "adapter", "--image", picture, "--question", "what is it?")
    assert code == 0
    assert text.strip()


def test_own_data_end_to_end(cli, own_experiment, tmp_path) -> None:
    out = tmp_path / "run"
    code, _, error = cli("run", own_experiment, "--out", out)
    assert (code, error) == (0, "")
    result = json.loads((out / "result.json").read_text())
    held = {c["id"]: c for c in result["manifest"]["clients"]}
    assert set(held) == {"clinic", "archive"}
    assert held["archive"]["image"] + held["archive"]["image_text"] == 0
    assert result["metrics"]["both"]["n"] == 6


def test_ls_names_everything(cli) -> None:
    code, text, _ = cli("ls")
    assert code == 0
    for name in ("memes", "easy-vqa", "embedded", "hybrid", "fedadagrad", "agnostic", "zero-shot"):
        assert name in text
    assert SPEC.summary.split(",")[0] in text


def spoil(own: Path, party: str) -> Path:
    return own / "parties" / f"{party}.json"


def rows(own: Path) -> list[dict]:
    return json.loads(spoil(own, "clinic").read_text())


def with_image(own: Path, path: str) -> str:
    items = rows(own)
    items[4]["image"] = path
    return json.dumps(items)


BROKEN = {
    "party file empty": (lambda own: "", "clinic.json"),
    "party file not JSON": (lambda own: '[{"id": 1,', "clinic.json"),
    "party file of the wrong shape": (lambda own: '{"rows": []}', "clinic.json"),
    "an item of the wrong shape": (lambda own: '[{"id": 1, "image": null}]', "clinic.json"),
    "an empty list": (lambda own: "[]", "clinic.json"),
    "an image that does not exist": (lambda own: with_image(own, "pictures/no.png"), "no.png"),
    "an image outside": (lambda own: with_image(own, "../../etc/hostname"), "must not contain"),
    "an image that is none": (lambda own: with_image(own, "test.json"), "test.json"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_own_data(cli, own_experiment, own, tmp_path, case) -> None:
    make, expected = BROKEN[case]
    spoil(own, "clinic").write_text(make(own))
    code, _, error = cli("run", own_experiment, "--out", tmp_path / "run")
    assert code == 2
    assert expected in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()  # nothing half-made stands in the way of the next try


def test_missing_party_folder_and_truncated_image(cli, own_experiment, own, tmp_path) -> None:
    picture = own / "pictures" / "1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    code, _, error = cli("run", own_experiment, "--out", tmp_path / "a")
    assert code == 2
    assert "1.png" in error
    picture.write_bytes(whole)
    shutil.rmtree(own / "parties")
    code, _, error = cli("run", own_experiment, "--out", tmp_path / "b")
    assert code == 2
    assert "parties" in error


def test_other_mistakes(cli, experiment, tmp_path) -> None:
    out = tmp_path / "run"
    assert cli("run", experiment, "--out", out, *FAST)[0] == 0
    code, _, error = cli("run", experiment, "--out", out, *FAST)
    assert code == 2
    assert "--overwrite" in error
    code, _, error = cli("run", tmp_path / "none.yaml")
    assert code == 2
    assert "does not exist" in error
    code, _, error = cli("run", experiment, "--out", tmp_path / "b", "data.train=8", "training.x=1")
    assert code == 2
    assert "training.x" in error
    code, _, error = cli("predict", out)
    assert code == 2
    code, _, error = cli("predict", out, "--text", "x")
    assert code == 2
    assert "not the adapter of a run" in error
    facts = json.loads((out / "adapter" / "fedmllm.json").read_text())
    facts["lora"]["rank"] = 4
    (out / "adapter" / "fedmllm.json").write_text(json.dumps(facts))
    code, _, error = cli("predict", out / "adapter", "--text", "x")
    assert code == 2
    assert "does not fit the model" in error
    code, _, error = cli("predict", out / "adapter", "--image", tmp_path / "no.png")
    assert code == 2
    assert "no.png" in error
    (out / "adapter" / "fedmllm.json").write_text("{}")
    code, _, error = cli("predict", out / "adapter", "--text", "x")
    assert code == 2
    assert "cannot be read" in error
    code, _, error = cli("demo", "--out", experiment)
    assert code == 2
    assert "is a file" in error
    code, _, error = cli("report", tmp_path / "nowhere")
    assert code == 2
    page = ("--out", tmp_path / "r.html")
    code, _, error = cli("report", out, *page, "--figures", experiment)
    assert (code, f"{experiment}: File exists" in error) == (2, True)
    grid = tmp_path / "grid.yaml"
    grid.write_text("base: {data: memes}\naxes: {seed: [0]}\n")
    code, _, error = cli("bench", grid, "--out", experiment / "below")
    assert (code, "Not a directory" in error) == (2, True)


@pytest.mark.parametrize(
    "command", [[Path(sys.executable).parent / "fedmllm"], [sys.executable, "-m", "fedmllm"]]
)
def test_the_installed_command_gives_exit_code_two(tmp_path, command) -> None:
    done = subprocess.run(
        [*command, "run", tmp_path / "no.yaml"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def loaded(monkeypatch) -> list[Mllm]:
    """The models that a command loads."""
    models: list[Mllm] = []

    def load(config):
        models.append(load_model(config))
        return models[-1]

    monkeypatch.setattr("fedmllm.experiment.load_model", load)
    return models


def trained(folder: Path) -> float:
    """The largest absolute value of an adapter's B, which starts at zero."""
    values = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in values.values())
    return max(float(v.abs().max()) for name, v in values.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("version", "how", "dtype"),
    [
        ("2.6", "none", "float32"),
        ("2.6", "nf4", "bfloat16"),
        ("2.6", "int4", "bfloat16"),
        ("2.5", "none", "bfloat16"),
        ("2.5", "nf4", "float32"),
        ("2.5", "int4", "float32"),
    ],
)
def test_a_round_on_the_papers_models(cli, experiment, tmp_path, loaded, version, how, dtype):
    """Tiny MiniCPM-V in the published layout, through the ordinary command; int4: its 4-bit
    edition, read as it is."""
    folder = published_folder(tmp_path / "model", version)
    if how == "int4":
        folder = int4_folder(tmp_path / "int4", folder, version)
        names = load_file(folder / "model.safetensors")
        assert any(name.endswith("nested_absmax") for name in names)
    code, out, err = cli(
        "run",
        experiment,
        f"model.path={folder}",
        "model.name=tiny-minicpmv",
        f"model.quantization={'nf4' if how == 'nf4' else 'none'}",
        f"model.dtype={dtype}",
        "setting=missing-b0.3",
        "--out",
        tmp_path / "run",
    )
    assert code == 0, err
    packed = {n for n, m in loaded[0].base.named_modules() if isinstance(m, Linear4bit)}
    assert any(name.startswith("llm.model.layers") for name in packed) == (how != "none")
    assert any(name.startswith("vpm") for name in packed) == (how == "int4")
    assert "llm.lm_head" not in packed
    assert trained(tmp_path / "run") > 0
    assert "× llm.model.layers.*.self_attn.q_proj" in out
    assert "vpm" not in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["history"][0]["loss"] < 20
    assert result["bytes"]["up"] > 0
    assert 0 <= result["metrics"]["both"]["auc"] <= 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("version", ["2.6", "2.5"])
def test_a_picture_that_is_cut_goes_through_a_round(
    cli, own, own_experiment, tmp_path, loaded, version
) -> None:
    """One of three pictures is larger than a view of 448 x 448, and is read as a thumbnail and
    slices."""
    Image.new("RGB", (900, 500), "red").save(own / "pictures" / "0.png")
    folder = published_folder(tmp_path / "model", version)
    code, _, err = cli(
        "run", own_experiment, f"model.path={folder}", "model.name=tiny", "--out", tmp_path / "run"
    )
    assert code == 0, err
    (mllm,) = loaded
    rows = [len(mllm.image_features(ImageFile(f"pictures/{i}.png", own)).features) for i in (0, 1)]
    views = rows[0] / mllm.base.config.query_num
    assert (views, rows[1]) == (3, mllm.base.config.query_num)
    assert trained(tmp_path / "run") > 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["history"][0]["loss"] < 20


GRID = """
base:
  data: {name: memes, train: 40, test: 16}
  training: {rounds: 1}
axes: {seed: [0, 1]}
"""


def test_bench_plans_refuses_and_tells_of_failures(cli, tmp_path, monkeypatch) -> None:
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(GRID)
    code, text, _ = cli("bench", file, "--plan", "--out", out, "--only", "seed=1")
    assert code == 0
    assert text.splitlines()[1].split()[:2] == ["s1", "missing"]
    assert not out.exists()  # a plan changes nothing
    code, _, error = cli("bench", file, "training.rounds=-1", "training.lr=0")
    assert code == 2
    assert "2 problems" in error
    assert "Traceback" not in error
    assert cli("bench", tmp_path / "gird.yaml")[0] == 2

    def run_jobs(jobs, **options):
        for job in jobs:
            yield job, Failure("no luck", "Traceback: deep down")

    monkeypatch.setattr("fedmllm.bench.run.run_jobs", run_jobs)
    code, text, _ = cli("bench", file, "--out", out)
    assert code == 1
    assert "0 done, 0 were done before, 2 failed" in text
    assert "FAILED s0: no luck" in text
    assert "Traceback: deep down" in (out / "bench.json").read_text()
    code, text, _ = cli("bench", file, "--plan", "--out", out)
    assert "s0  failed" in text
    assert "no luck" in text


@pytest.mark.parametrize(
    ("words", "processes", "devices"),
    [
        ([], 5, []),
        (["--devices", "0,1,2,3"], 4, ["0", "1", "2", "3"]),
        (["--devices", "0, 1", "model.device=cuda"], 2, ["0", "1"]),
        (["--devices", "0,1", "--processes", "3"], 3, ["0", "1"]),
        (["--processes", "7"], 7, []),
        (["model.device=cuda"], 1, []),
    ],
)
def test_bench_takes_a_process_a_device_or_a_core(
    words, processes, devices, cli, tmp_path, monkeypatch
) -> None:
    """Five cores that this process may use; runs on an accelerator that nobody shared out are one
    at a time."""
    given = {}

    def run_jobs(jobs, **options):
        given.update(options)
        for job in jobs:
            yield job, Failure("not run")

    monkeypatch.setattr("fedmllm.bench.run.run_jobs", run_jobs)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 4, 6, 8}, raising=False)
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    assert cli("bench", file, "--out", tmp_path / "out", *words)[0] == 1
    assert (given["processes"], given["devices"]) == (processes, devices)


def test_report_writes_what_the_suffix_says(cli, tmp_path) -> None:
    results = [result("fedavg", "missing-b0.5", seed) for seed in (0, 1)]
    runs = write(tmp_path / "runs", results)
    names = [tmp_path / f"r.{suffix}" for suffix in ("md", "tex", "csv")]
    outs = [word for name in names for word in ("--out", name)]
    code, _, _ = cli("report", runs, *outs, "--condition", "both", "--condition", "neither")
    assert code == 0
    assert all(name.exists() for name in names)
    assert names[0].read_text().count("### memes") == 2
    for words in (["--out", "r.pdf"], ["--condition", "bot"]):
        code, _, error = cli("report", runs, *words)
        assert code == 2
        assert "Traceback" not in error


def test_what_the_system_refuses_is_no_traceback(cli, experiment, tmp_path, monkeypatch) -> None:
    """As root nothing is refused, so the system's answer is given by hand."""
    out = tmp_path / "locked" / "run"

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = cli("run", experiment, "--out", out)
    assert code == 2
    assert err == f"error: {out}: Permission denied. Free it, or choose another place\n"


def test_another_fault_of_the_system_is_not_hidden(cli, experiment, monkeypatch) -> None:
    def broken(self, *_, **__):
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(Path, "mkdir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cli("run", experiment, "--out", "runs/x")


@pytest.mark.parametrize("command", ["init", "simulate", "node", "supervise", "start", "resume"])
def test_deploy_without_its_extra_says_what_to_install(cli, experiment, monkeypatch, command):
    """As if NVFlare were not there."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "nvflare" else found(name, *a)
    )
    more = ["--admin", "a", "--experiment", "x"] if command == "supervise" else []
    code, out, err = cli("deploy", command, experiment, *more)
    assert (code, out) == (2, "")
    assert err == f"error: {needs_package('deploy', 'NVFlare', 'nvflare')}\n"
