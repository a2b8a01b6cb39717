"""Model folders of the store as they are loaded: what is damaged is not, and what is said names the commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from pipeline import SelfForcingPipeline
from pipeline.cli import check_model_folder
from pipeline.errors import WeightsError
from pipeline.file_hashes import hash_files
from pipeline.folder import ModelFolder
from tests.hub import Hub, point_to, published_files, write_published
from tests.small import write_model_folder
from weights import hub as hub_module
from weights.install import download, verify
from weights.manifest import Model, load_manifest
from weights.store import HOME_VARIABLE, Store
from weights.stored import StoredModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED = "self-forcing-dmd"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small model that has the id of a listed one."""
    manifest = write_published(tmp_path_factory.mktemp("published"))
    data = json.loads(manifest.read_text())
    data["models"][0]["id"] = PUBLISHED
    manifest.write_text(json.dumps(data))
    return manifest


@pytest.fixture(scope="module")
def downloaded(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("downloaded")
    with Hub(published_files(published)) as hub, pytest.MonkeyPatch.context() as patch:
        point_to(hub, patch)
        model = load_manifest(published).model(PUBLISHED)
        download(model, Store(home), lambda progress: None, lambda line: None)
    return home


@pytest.fixture
def home(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, which is where downloads lie by default; the links between its files are kept."""
    subprocess.run(["cp", "-a", str(downloaded), str(tmp_path / "home")], check=True)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(published: Path) -> Model:
    return load_manifest(published).model(PUBLISHED)


def flip(path: Path, place: float = 0.7, *, keep_time: bool = False) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def commands(*names: str, options: str = "") -> str:
    return ", then ".join(f"`python -m weights {name} {PUBLISHED}{options}`" for name in names)


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path.name} was read")

    monkeypatch.setattr("weights.stored.sha256_of", refuse)


def test_what_is_sound_loads_and_only_the_transformer_is_hashed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_reading(monkeypatch)
    hashed: list[str] = []

    def counted(paths: list[Path]) -> object:
        hashed.extend(path.parent.name for path in paths)
        return hash_files(paths)

    monkeypatch.setattr("pipeline.folder.hash_files", counted)
    configs = {"config.json"}
    monkeypatch.setattr(
        StoredModel,
        "_noted",
        lambda self, kind, noted=StoredModel._noted: {
            name: entry for name, entry in noted(self, kind).items() if name not in configs
        },
    )
    pipe = SelfForcingPipeline.from_pretrained(home / PUBLISHED, device="cpu")
    assert pipe.weights_sha256 == hash_files([home / PUBLISHED / "transformer" / WEIGHTS]).together
    assert hashed == ["transformer"], "once, for the comparison and for recipes"


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9, 0.999])
def test_a_bit_that_flipped_in_the_transformer_is_not_loaded(home: Path, monkeypatch, place: float) -> None:
    flip(home / PUBLISHED / "transformer" / WEIGHTS, place, keep_time=True)
    monkeypatch.setattr("pipeline.transformer.CausalWanTransformer3DModel.from_pretrained", None)  # is not called
    with pytest.raises(WeightsError) as raised:
        SelfForcingPipeline.from_pretrained(home / PUBLISHED, device="cpu")
    said = f"{WEIGHTS} in {PUBLISHED}/transformer has changed since it was downloaded. Run "
    assert str(raised.value) == f"{said}{commands('verify', 'download')}."


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", f"vae/{WEIGHTS}", "tokenizer/tokenizer.json"])
def test_what_was_written_to_since_is_not_loaded(home: Path, part: str) -> None:
    flip(home / PUBLISHED / part)
    folder = ModelFolder(home / PUBLISHED)
    kind, name = part.split("/")
    with pytest.raises(WeightsError, match=f"{name} in {PUBLISHED}/{kind} has changed since it was downloaded"):
        folder.load_tokenizer() if kind == "tokenizer" else folder.load(kind, None)


def test_a_file_that_is_gone_or_shorter_is_not_loaded(home: Path) -> None:
    os.truncate(home / PUBLISHED / "vae" / WEIGHTS, 1000)
    (home / PUBLISHED / "taehv" / WEIGHTS).unlink()
    folder = ModelFolder(home / PUBLISHED)
    with pytest.raises(WeightsError, match="has changed"):
        folder.load("vae", None)
    with pytest.raises(WeightsError, match="is missing"):
        folder.load("taehv", None)


def test_the_commands_that_are_named_mend_it(home: Path, published: Path, model: Model, monkeypatch) -> None:
    flip(home / PUBLISHED / "transformer" / WEIGHTS, keep_time=True)
    store = Store(home)
    with pytest.raises(WeightsError, match=f"python -m weights download {PUBLISHED}"):
        verify(model, store, lambda progress: None)
    with pytest.raises(WeightsError) as raised:
        ModelFolder(home / PUBLISHED).load("transformer", None)
    assert str(raised.value).endswith(f"is damaged or not whole. Get it again with {commands('download')}.")
    with Hub(published_files(published)) as hub:
        point_to(hub, monkeypatch)
        download(model, store, lambda progress: None, lambda line: None)
    assert SelfForcingPipeline.from_pretrained(home / PUBLISHED, device="cpu").spec.name == "Small"


def test_a_copy_of_the_store_is_read_until_it_is_verified(home: Path, model: Model, monkeypatch) -> None:
    shutil.copytree(home, home.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(home)
    home.with_name("copy").rename(home)
    with Hub({}) as hub:
        point_to(hub, monkeypatch)
        download(model, Store(home), lambda progress: None, lambda line: None)  # puts the links back, fetches nothing
        assert hub.requests == []
    read: list[str] = []
    sha256_of = hub_module.sha256_of
    monkeypatch.setattr("weights.stored.sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    ModelFolder(home / PUBLISHED).load("vae", None)
    assert WEIGHTS in read
    verify(model, Store(home), lambda progress: None)
    read.clear()
    ModelFolder(home / PUBLISHED).load("vae", None)
    assert read == []


def test_parts_recorded_before_kinds_were_are_compared_as_well(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in home.glob(".parts/*/record.json"):
        content = json.loads(record.read_text())
        del content["kind"]
        for entry in content["files"].values():
            del entry["mtime_ns"]
        record.write_text(json.dumps(content))
    flip(home / PUBLISHED / "transformer" / WEIGHTS, keep_time=True)
    with pytest.raises(WeightsError, match="has changed"):
        ModelFolder(home / PUBLISHED).load("transformer", None)


def test_a_folder_that_was_copied_away_is_only_loaded(home: Path, tmp_path: Path) -> None:
    away = tmp_path / "elsewhere" / "mine"
    shutil.copytree(home / PUBLISHED, away)
    flip(away / "transformer" / WEIGHTS, 0.9)
    assert SelfForcingPipeline.from_pretrained(away, device="cpu").spec.name == "Small"
    os.truncate(away / "vae" / WEIGHTS, 1000)
    with pytest.raises(WeightsError, match=r"vae of Small cannot be loaded.*Get the model folder again\."):
        ModelFolder(away).load("vae", None)


def test_another_home_is_asked_for_by_its_option(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(home / PUBLISHED / "vae" / WEIGHTS)
    monkeypatch.delenv(HOME_VARIABLE)
    with pytest.raises(WeightsError) as raised:
        ModelFolder(home / PUBLISHED).load("vae", None)
    assert str(raised.value).endswith(f"Run {commands('verify', 'download', options=' --home FOLDER')}.")


@pytest.mark.parametrize(("content", "said"), [(None, "has no model_index.json"), ("{", "cannot be read")])
def test_an_index_that_is_damaged_or_gone_is_got_by_a_command(home: Path, content: str | None, said: str) -> None:
    index = home / PUBLISHED / "model_index.json"
    index.unlink()
    if content is not None:
        index.write_text(content)
    with pytest.raises(WeightsError, match=f"{said}.*`python -m weights download {PUBLISHED}`"):
        ModelFolder(home / PUBLISHED)


def test_what_does_not_fit_names_the_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredModel, "check", lambda *arguments: None)  # what it would find, shows later as well
    config = home / PUBLISHED / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 9}))
    (home / PUBLISHED / "vae" / "config.json").write_text("{")
    (home / PUBLISHED / "tokenizer" / "tokenizer.json").write_text("{")
    folder = ModelFolder(home / PUBLISHED)
    for load in (lambda: folder.load("transformer", None), lambda: folder.load("vae", None), folder.load_tokenizer):
        with pytest.raises(WeightsError) as raised:
            load()
        assert str(raised.value).endswith(f"Run {commands('verify', 'download')}.")


# ---- before anything is loaded: `python app.py` and `python -m pipeline` ask the same


@pytest.mark.parametrize("place", ["{home}/" + PUBLISHED, PUBLISHED, "models/" + PUBLISHED])
def test_a_model_that_is_not_here_is_got_by_a_command(tmp_path: Path, monkeypatch, place: str) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as raised:
        check_model_folder(Path(place.format(home=tmp_path)))
    assert str(raised.value).startswith("There is no model folder ")
    assert str(raised.value).endswith(f". Get Self-Forcing DMD with {commands('download')}.")


def test_a_model_that_is_half_here_is_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    part = tmp_path / ".downloads" / PUBLISHED / "self_forcing_dmd.pt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"begun")
    for place in (Path(PUBLISHED), tmp_path / PUBLISHED):
        with pytest.raises(WeightsError) as raised:
            check_model_folder(place)
        assert str(raised.value).endswith(f"is only partly here. Go on with {commands('download')}.")
    (tmp_path / PUBLISHED).mkdir()
    with pytest.raises(WeightsError, match=f"no model_index.json.*partly here.*weights download {PUBLISHED}"):
        check_model_folder(tmp_path / PUBLISHED)


def test_the_name_of_a_model_that_is_here_leads_to_its_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Store, "presence", lambda self, model: "present")
    with pytest.raises(WeightsError, match=f"is here already: pass --model models/{PUBLISHED}\\."):
        check_model_folder(Path(PUBLISHED))


def test_any_other_name_is_only_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="Pass an existing one with --model"):
        check_model_folder(tmp_path / "mine")
    with pytest.raises(WeightsError, match="no model_index.json. Pass another one"):
        check_model_folder(tmp_path)
    assert check_model_folder(write_model_folder(tmp_path / "own")) == tmp_path / "own"


@pytest.mark.parametrize("program", ["app", "pipeline.cli", "prompting.cli", "pipeline.compare_cli"])
def test_the_programs_say_it(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], program: str) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    prompt = [] if program == "app" else ["a ball"]
    sides = ["--a", "fp8=on", "--b", "fp8=off"] if program == "pipeline.compare_cli" else []
    assert import_module(program).main([*prompt, "--model", PUBLISHED, *sides]) == 2
    out, err = capsys.readouterr()
    said = f"There is no model folder '{PUBLISHED}'. Get Self-Forcing DMD with {commands('download')}."
    assert out == "" and err.strip() == said


def test_files_are_hashed_alone_and_together(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 3)
    found = hash_files(sorted(tmp_path.iterdir()))
    assert found.together == hashlib.sha256(b"aaabbbccc").hexdigest()
    assert found.single == {name: hashlib.sha256((name * 3).encode()).hexdigest() for name in "abc"}
