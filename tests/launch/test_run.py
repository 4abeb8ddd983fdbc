"""Scripts that nobody changed, in processes of their own: with ``bnguard run`` and without."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch

from bnguard import watch as watch_model
from bnguard.launch.trained_models import find_copies, find_roots
from tests.cli.running import bnguard, import_first_from, on_ranks, script, set_variables

SCRIPT = Path(__file__).with_name("trainings.py")
PROJECT = Path(__file__).parents[2]
REPORT = "bnguard-report.json"


@pytest.fixture(scope="session")
def entry_points(tmp_path_factory):
    """A folder with the entry points of this pyproject.toml, wherever bnguard is installed."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "bnguard-0.0.dist-info"
    info.mkdir()
    groups = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bnguard\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(tmp_path, entry_points):
    """Run ``python ARGUMENTS`` in a folder, as a user does."""
    path = os.pathsep.join([str(entry_points), str(PROJECT), os.environ.get("PYTHONPATH", "")])

    def run(*arguments, folder="watched", **environment):
        (tmp_path / folder).mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path / folder,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )

    return run


@pytest.fixture
def train(tmp_path, entry_points):
    """Run a training as ``python`` does, in a process that begins with torch imported."""

    def train(*arguments, folder="plain", **environment):
        (tmp_path / folder).mkdir(exist_ok=True)
        prepare = functools.partial(_prepare, entry_points, environment)
        return script(tmp_path / folder, SCRIPT, *arguments, prepare=prepare)

    return train


@pytest.fixture
def watch(tmp_path, entry_points):
    """Run ``bnguard run ARGUMENTS``, in such a process."""

    def watch(*arguments):
        (tmp_path / "watched").mkdir(exist_ok=True)
        prepare = functools.partial(_prepare, entry_points, {})
        return bnguard(tmp_path / "watched", *OWN, *arguments, prepare=prepare)

    return watch


def _prepare(entry_points, environment):
    import_first_from(entry_points)
    set_variables(environment)


@pytest.fixture
def run_both(tmp_path, train, watch):
    """Run a script without bnguard and with it."""

    def run_both(*arguments):
        plain, done = train(*arguments), watch(SCRIPT, *arguments)
        assert (plain.returncode, done.returncode) == (0, 0), plain.stderr + done.stderr
        assert_same_weights(tmp_path)
        return plain, done

    return run_both


OWN = ("run", "--log-dir", "log")
BNGUARD = ("-m", "bnguard", *OWN)


def codes(folder):
    """Return the codes of warnings and errors in a report."""
    document = json.loads((folder / REPORT).read_text())
    return {f["code"] for f in document["findings"] if f["severity"] != "info"}


def assert_same_weights(tmp_path):
    plain, watched = (torch.load(tmp_path / f / "weights.pt") for f in ("plain", "watched"))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


CASES = {
    "plain": {"BN301", "BN302", "BN303"},
    "healthy": set(),
    "compiled": {"BN302", "BN303"},
    "teacher": set(),
    "fabric": {"BN301", "BN302", "BN303"},
    "accelerate": {"BN301", "BN302", "BN303"},
    "transformers": {"BN301", "BN302", "BN303"},
    "workers": {"BN303"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_script_trains_the_same_weights_and_its_fault_is_named(name, run_both, tmp_path):
    if name in ("accelerate", "transformers") and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    _, done = run_both(name)
    assert codes(tmp_path / "watched/log") == CASES[name]
    assert ("means: bnguard explain BN" in done.stderr) is bool(CASES[name])
    assert list((tmp_path / "watched/log").glob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_trainer_of_lightning_gets_the_callback_once(package, run, train, watch, tmp_path):
    plain = train("lightning", package)
    assert "bnguard" not in plain.stdout + plain.stderr
    done = run(*BNGUARD, SCRIPT, "lightning", package)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path)
    assert done.stdout.count("bnguard · watching 1 BN layer") == 1
    assert done.stdout.count("bnguard · 1 BN layer ·") == 1
    assert "bnguard · 1 BN layer" not in done.stderr
    (checkpoint,) = (tmp_path / "watched").rglob("*.ckpt")
    assert "bnguard" in torch.load(checkpoint, weights_only=False)
    assert "BN303" in codes(tmp_path / "watched/log")

    shutil.rmtree(tmp_path / "watched")
    done = watch(SCRIPT, "lightning", package, "--callback")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path)
    assert done.stdout.count("bnguard · watching 1 BN layer") == 1
    assert "BN303" in codes(tmp_path / "watched/log")


@pytest.mark.slow
def test_the_command_line_of_lightning_gets_the_callback(run_both, tmp_path):
    run_both("lightning_cli")
    assert "BN303" in codes(tmp_path / "watched/log")


@pytest.mark.slow
def test_a_variable_of_the_environment_is_enough_for_lightning(train):
    done = train("lightning", "lightning.pytorch", BNGUARD="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bnguard · watching 1 BN layer") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_models", "gan"])
def test_each_model_has_its_report(name, run_both, tmp_path):
    run_both(name)
    log = tmp_path / "watched/log"
    reports = [codes(log), codes(log / "Sequential-2")]
    assert reports == ([{"BN303"}, set()] if name == "two_models" else [set(), set()])


@pytest.mark.slow
@pytest.mark.parametrize("is_healthy", [False, True])
def test_an_average_of_the_weights_is_watched_as_well(is_healthy, run_both, tmp_path):
    run_both("follower", *(["healthy"] if is_healthy else []))
    log = tmp_path / "watched/log"
    assert [codes(log), codes(log / "Sequential-2")] == [set(), set() if is_healthy else {"BN304"}]


@pytest.mark.slow
def test_ranks_share_one_report(run, tmp_path):
    (tmp_path / "plain").mkdir()
    for plain in on_ranks(2, tmp_path / "plain", SCRIPT, "ddp"):
        assert plain.returncode == 0, plain.stderr
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run(*launcher, *BNGUARD, SCRIPT, "ddp")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path)
    assert done.stderr.count("bnguard · 1 BN layer") == 1
    assert "BN303" in codes(tmp_path / "watched/log")


@pytest.mark.slow
def test_a_script_that_raises_ends_as_it_does_alone_and_is_reported(run, tmp_path):
    plain = run(SCRIPT, "raising", folder="plain")
    done = run(*BNGUARD, SCRIPT, "raising")
    assert plain.returncode == done.returncode == 1
    assert done.stderr.endswith(plain.stderr)
    assert_same_weights(tmp_path)
    assert codes(tmp_path / "watched/log") == {"BN303"}


@pytest.mark.slow
def test_a_script_that_never_steps_is_said_to(watch, tmp_path):
    done = watch(SCRIPT, "never")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "bnguard: no optimizer took a step, so nothing was watched\n"
    assert not (tmp_path / "watched/log").exists()


@pytest.mark.slow
def test_a_model_that_no_optimizer_holds_is_mentioned(watch):
    done = watch(SCRIPT, "functional")
    assert done.returncode == 0
    assert "the optimizer's weights belong to no model, as with torch.func" in done.stderr
    assert "monitor = bnguard.watch(model), and monitor.step() after each step" in done.stderr


@pytest.mark.slow
def test_a_bn_class_of_another_framework_is_mentioned(watch):
    done = watch(SCRIPT, "of_another_framework")
    assert done.returncode == 0
    assert "Sequential has no BN layers that bnguard knows (BatchNormalization " in done.stderr
    assert done.stderr.endswith(", so nothing was watched\n")


@pytest.mark.slow
def test_the_exit_status_is_the_level_of_the_findings_if_asked_for(watch, tmp_path):
    page = tmp_path / "page.html"
    done = watch("--fail-on=warning", "--html", page, SCRIPT, "plain")
    assert done.returncode == 1
    assert "means: bnguard explain BN" in done.stderr
    assert "<html" in page.read_text()[:200]


_ENVIRONMENT = """
import atexit, json, os, sys
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "package": __package__, "spec": __spec__ and __spec__.name, "same": main.__dict__ is globals(),
    "loader": type(__loader__).__name__, "keys": sorted(globals()),
    "stdout": sys.stdout.errors,
}))
atexit.register(print, "at exit")
if sys.argv[1] == "text":
    sys.exit("no such thing")
if sys.argv[1] == "interrupt":
    raise KeyboardInterrupt
if sys.argv[1] == "syntax":
    compile("(", "there.py", "exec")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["0", "7", "text", "interrupt", "syntax"])
@pytest.mark.parametrize("target", [("script.py",), ("-m", "package.script")])
def test_a_script_finds_what_python_gives_it(target, end, run, tmp_path):
    folder = tmp_path / "watched"
    (folder / "package").mkdir(parents=True)
    for path in (folder / "script.py", folder / "package/script.py"):
        path.write_text(_ENVIRONMENT)
    plain, done = run(*target, end), run(*BNGUARD, *target, end)
    assert done.returncode == plain.returncode
    assert done.stdout == plain.stdout
    nothing = "bnguard: no optimizer took a step, so nothing was watched\n"
    own = [line for line in plain.stderr.splitlines() if "runpy" not in line]
    assert done.stderr.replace(nothing, "").splitlines() == own
    # A script that failed has said why itself.
    assert (nothing in done.stderr) is (end == "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the script is missing: bnguard run SCRIPT.py, or -m MODULE"),
        (["nowhere.py"], "nowhere.py is not a file: name a script, or a module with -m"),
        (["-m"], "-m needs the name of a module"),
        (["--fail-on", "info", "x.py"], "--fail-on: "),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, message, capsys):
    from bnguard.cli.main import main

    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


WATCHED_BY_ITSELF = """
import sys
import torch
from torch import nn
import bnguard

model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.001))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
monitor = bnguard.watch(model, optimizer=optimizer)
for _ in range(60):
    optimizer.zero_grad()
    model(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    model(torch.randn(64, 8))
if "ask" in sys.argv:
    print(monitor.report())
"""


@pytest.mark.parametrize("ask", [True, False])
def test_what_a_script_watches_itself_counts_and_is_shown_once(ask, watch, tmp_path):
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "own.py").write_text(WATCHED_BY_ITSELF)
    done = watch("--fail-on", "warning", "own.py", *(["ask"] if ask else []))
    assert done.returncode == 1, done.stderr
    assert (done.stdout + done.stderr).count("· 60 steps ·") == 1
    assert "BN303" in codes(tmp_path / "watched" / "log")


def test_the_entry_point_adds_and_imports_nothing_by_itself():
    code = (
        "import sys; from bnguard.launch.entry_point import callbacks; assert callbacks() == []; "
        "print(*({'torch', 'rich', 'numpy', 'lightning', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n", done.stderr


def test_the_outermost_modules_are_found():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(first, torch.nn.BatchNorm1d(2))
    wrapped = torch.compile(model, backend="eager")
    other = torch.nn.Sequential(second)
    parameters = {id(part) for module in (first, second) for part in module.parameters()}
    roots = find_roots(parameters)
    assert {id(root) for root in roots} == {id(wrapped), id(other)}


def test_copies_are_found_unless_something_trains_or_watches_them():
    def network(*, is_lazy=False):
        first = torch.nn.LazyLinear(2) if is_lazy else torch.nn.Linear(2, 2)
        return torch.nn.Sequential(first, torch.nn.BatchNorm1d(2))

    model, trained, watched, _lazy = network(), network(), network(), network(is_lazy=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    _optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    with watch_model(watched):
        copies = find_copies([model])
    assert [id(copy) for copy in copies] == [id(average.module)]
