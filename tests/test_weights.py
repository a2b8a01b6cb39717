"""From a manifest entry through a hub to video: the whole way, every early end of it, and what is said then."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from pipeline import GenerationRequest, SelfForcingPipeline
from pipeline.checkpoint import transformer_from_wan
from pipeline.errors import DownloadError, WeightsError
from tests.hub import (
    PROGRAM_WITH_SMALL_PIECES,
    REPOSITORY,
    Hub,
    golden_weights,
    point_to,
    published_files,
    write_published,
)
from tests.waiting import wait_until
from weights import cli, install
from weights import hub as hub_module
from weights.install import download, verify
from weights.manifest import Model, load_manifest
from weights.progress import Meter, Progress
from weights.store import Store

ROOT = Path(__file__).resolve().parent.parent
BIG = "generator.pt"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(published_files(published)) as hub:
        point_to(hub, monkeypatch)
        monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        # The library waits a second before it tries again. Only there: the hub of these tests has sleeps of its own.
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def model(published: Path) -> Model:
    return load_manifest(published).model("small")


def get(model: Model, store: Store, seen: list[Progress] | None = None, said: list[str] | None = None) -> Path:
    return download(model, store, (seen if seen is not None else []).append, (said if said is not None else []).append)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def downloaded(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the small model in it."""
    home = tmp_path_factory.mktemp("downloaded")
    with Hub(published_files(published)) as hub, pytest.MonkeyPatch.context() as patch:
        point_to(hub, patch)
        get(load_manifest(published).model("small"), Store(home))
    return home


@pytest.fixture
def copy(downloaded: Path, tmp_path: Path) -> Store:
    """A copy of it to spoil; the links between its files are kept."""
    subprocess.run(["cp", "-a", str(downloaded), str(tmp_path / "copy")], check=True)
    return Store(tmp_path / "copy")


# ---- the whole way


def test_an_entry_becomes_a_folder_that_makes_video(downloaded: Path) -> None:
    pipe = SelfForcingPipeline.from_pretrained(downloaded / "small", device="cpu")
    video = pipe.generate(GenerationRequest(prompt="a red balloon rises", seed=7, seconds=2))
    assert video.frames.shape == (21, 32, 48, 3) and video.run.model == "Small"
    assert (
        pipe.generate(GenerationRequest(prompt="a red balloon rises", seed=7, seconds=1, taehv=True)).frames.std() > 0
    )


def test_the_converted_weights_are_the_published_ones(downloaded: Path, published: Path) -> None:
    weights, config = golden_weights("case3_kv_chunkwise.safetensors")
    expected = transformer_from_wan(config["model"], weights).state_dict()
    found = load_file(downloaded / "small" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    text = UMT5EncoderModel.from_pretrained(downloaded / "small" / "text_encoder")
    original = torch.load(published.parent / "files" / "text.pth", weights_only=True)
    assert torch.equal(text.encoder.embed_tokens.weight, original["token_embedding.weight"])
    assert torch.equal(text.encoder.block[1].layer[1].DenseReluDense.wi_1.weight, original["blocks.1.ffn.fc1.weight"])


def test_only_what_is_needed_is_asked_for_at_its_revision(hub: Hub, store: Store, model: Model) -> None:
    get(model, store)
    got = [path for method, path, _ in hub.requests if method == "GET"]
    assert len(got) == len(set(got)) == sum(len(part.files) for part in model.parts)
    assert all(f"/resolve/{model.transformer.revision}/" in path for path in got) and "fp8" not in "".join(got)


def test_progress_only_grows_and_ends_at_all_of_it(hub: Hub, store: Store, model: Model) -> None:
    seen: list[Progress] = []
    get(model, store, seen)
    counts = [progress.done for progress in seen]
    assert counts == sorted(counts) and counts[-1] == seen[-1].total
    assert seen[-1].total == sum(file.bytes or 0 for part in model.parts for file in part.files)


def test_a_second_time_nothing_is_asked(hub: Hub, store: Store, model: Model) -> None:
    folder = get(model, store)
    hub.requests.clear()
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert get(model, store) == folder
    assert hub.requests == [] and (folder / "model_index.json").stat().st_mtime_ns == before


def test_another_model_takes_only_its_own_transformer(hub: Hub, copy: Store, published: Path) -> None:
    other = load_manifest(published).model("other")
    folder = get(other, copy)
    assert [path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET"] == [BIG]
    one, two = (copy.home / name / "vae" / "diffusion_pytorch_model.safetensors" for name in ("small", "other"))
    assert one.samefile(two), "what they share is on the disk once"
    assert SelfForcingPipeline.from_pretrained(folder, device="cpu").spec.name == "Other"


def test_nothing_of_the_download_is_left(downloaded: Path) -> None:
    assert not any((downloaded / ".downloads").iterdir())
    assert not list(downloaded.rglob("*.part")) and not list(downloaded.rglob("*.partial"))


def test_the_8_bit_text_encoder_is_scaled_back(hub: Hub, copy: Store, published: Path) -> None:
    manifest = load_manifest(published)
    exact = UMT5EncoderModel.from_pretrained(copy.home / "small" / "text_encoder")
    model = manifest.model("small").with_part(manifest.parts["text-fp8"])
    folder = get(model, copy)
    rounded = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    q, near = (encoder.encoder.block[0].layer[0].SelfAttention.q.weight for encoder in (exact, rounded))
    assert not torch.equal(q, near) and torch.allclose(q, near, atol=0.07 * q.abs().max().item())
    assert copy.as_installed(manifest.model("small"), manifest) == model
    assert copy.presence(model) == "present"


def test_a_hash_that_nobody_published_is_recorded_and_said(tmp_path: Path, store: Store, monkeypatch) -> None:
    manifest = write_published(tmp_path / "unknown", sha256=False)
    model = load_manifest(manifest).model("small")
    with Hub(published_files(manifest)) as hub:
        point_to(hub, monkeypatch)
        said: list[str] = []
        get(model, store, said=said)
        found = store.sources(model.transformer)[BIG]
        assert found == {"bytes": len(hub.files[BIG]), "sha256": hashlib.sha256(hub.files[BIG]).hexdigest()}
        assert any(found["sha256"] in line and BIG in line and "hub itself names" in line for line in said)
        # Removed and got again, it has to be the same.
        store.remove_model(model, [], [])
        right = hub.files[BIG]
        content = bytearray(right)
        content[-1000] ^= 1
        hub.files[BIG] = bytes(content)
        with pytest.raises(WeightsError, match=r"recorded at the first download.*delete \.state\.json.*verify ID`"):
            get(model, store)
        hub.files[BIG] = right[:-1]
        with pytest.raises(WeightsError, match="another file than was downloaded before"):
            get(model, store)
        # Another revision is another file.
        data = json.loads(manifest.read_text())
        data["models"][0]["revision"] = hub.commit = "f" * 40
        manifest.write_text(json.dumps(data))
        hub.files = {**hub.files, f"/{REPOSITORY}/resolve/{hub.commit}/{BIG}": bytes(content)}
        newer = load_manifest(manifest).model("small")
        assert store.sources(newer.transformer) == {} != store.sources(model.transformer)


def test_a_hash_that_only_the_hub_names_is_compared(tmp_path: Path, store: Store, monkeypatch) -> None:
    manifest = write_published(tmp_path / "unknown", sha256=False)
    model = load_manifest(manifest).model("small")
    with Hub(published_files(manifest), tags={BIG: "0" * 64}) as hub:
        point_to(hub, monkeypatch)
        with pytest.raises(WeightsError, match=r"not the file that the hub itself names.*not 0000000000000000"):
            get(model, store)
        assert store.sources(model.transformer) == {}
        hub.tags = {BIG: "0" * 40}  # the name of a small file's contents in git
        said: list[str] = []
        get(model, store, said=said)
        assert any("Nobody has published the sha256 of generator.pt" in line for line in said)


# ---- ends that come early


@pytest.mark.parametrize("share", [n / 10 for n in range(10)])
def test_a_cut_connection_is_taken_up_again(hub: Hub, store: Store, model: Model, share: float) -> None:
    size = len(hub.files[BIG])
    hub.cuts = [int(share * size)]
    get(model, store)
    assert hub.sent <= sum(map(len, hub.files.values())) + 8192, "nothing but the last piece came twice"


def test_a_connection_that_stays_away_is_said_and_the_next_call_goes_on(hub: Hub, store: Store, model: Model) -> None:
    size = len(hub.files[BIG])
    hub.cuts = [size // 2] + [0] * 6
    with pytest.raises(DownloadError, match=r"connection broke.*What has come is kept\.$") as raised:
        get(model, store)
    assert str(store.home) not in str(raised.value) and hub.url not in str(raised.value)
    partial = store.download_folder(model.transformer) / f"{BIG}.part"
    assert size // 2 - 8192 <= partial.stat().st_size <= size // 2
    assert store.presence(model) == "partial"
    begun = partial.stat().st_size
    hub.requests.clear()
    get(model, store)
    assert next(wanted for method, path, wanted in hub.requests if method == "GET") == f"bytes={begun}-"


def test_a_server_that_knows_no_ranges_begins_anew(hub: Hub, store: Store, model: Model) -> None:
    hub.cuts, hub.ranges = [len(hub.files[BIG]) // 2] + [0] * 6, False
    with pytest.raises(DownloadError):
        get(model, store)
    seen: list[Progress] = []
    get(model, store, seen)
    assert seen[-1].done == seen[-1].total and store.presence(model) == "present"


def test_a_longer_rest_than_the_file_is_thrown_away(hub: Hub, store: Store, model: Model) -> None:
    folder = store.download_folder(model.transformer)
    folder.mkdir(parents=True)
    (folder / f"{BIG}.part").write_bytes(b"x" * (len(hub.files[BIG]) + 1))
    get(model, store)
    assert store.presence(model) == "present"


@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 0.99])
def test_wrong_bytes_are_found_deleted_and_fetched_again(hub: Hub, store: Store, model: Model, place: float) -> None:
    right = hub.files[BIG]
    wrong = bytearray(right)
    wrong[int(place * len(wrong))] ^= 4
    hub.files[BIG] = bytes(wrong)
    with pytest.raises(WeightsError, match=r"generator\.pt of somebody/small is not the file.*deleted"):
        get(model, store)
    assert not any(store.download_folder(model.transformer).iterdir())
    assert not store.part_folder(model.transformer).exists()
    hub.files[BIG] = right
    get(model, store)
    assert store.presence(model) == "present"


def test_a_rest_of_another_file_is_found_by_the_hash(hub: Hub, store: Store, model: Model) -> None:
    folder = store.download_folder(model.transformer)
    folder.mkdir(parents=True)
    (folder / f"{BIG}.part").write_bytes(b"x" * 5000)
    with pytest.raises(WeightsError, match="deleted"):
        get(model, store)
    get(model, store)


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "EntryNotFound", "does not exist at revision 0123456789ab"),
        (404, "RevisionNotFound", "no longer has the revision"),
        (401, "RepoNotFound", "no repository somebody/small for you.*hf auth login"),
        (403, "GatedRepo", "terms accepted first.*https://huggingface.co/somebody/small"),
        (403, "", "answered 403.*hf auth login"),
        (500, "", "answered 500.*What has come is kept"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, store: Store, model: Model, status: int, code: str, sentence: str) -> None:
    hub.status, hub.error_code = {BIG: status}, code
    with pytest.raises(DownloadError, match=sentence) as raised:
        get(model, store)
    assert "127.0.0.1" not in str(raised.value)


def test_a_slow_hub_is_waited_for_and_a_silent_one_is_not(hub: Hub, store: Store, model: Model, monkeypatch) -> None:
    hub.bytes_per_second = 4e6  # a tenth of a second in all
    get(model, store)
    assert store.presence(model) == "present"
    monkeypatch.setattr(hub_constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.silence = 0.3
    store.remove_model(model, [], [])
    with pytest.raises(DownloadError, match=r"connection broke \(ReadTimeout\)"):
        get(model, store)


@pytest.mark.parametrize("sha256", [True, False])
def test_another_commit_or_size_is_refused_before_anything_comes(
    hub: Hub, store: Store, model: Model, tmp_path: Path, sha256: bool
) -> None:
    if not sha256:
        model = load_manifest(write_published(tmp_path / "unknown", sha256=False)).model("small")
    hub.commit = "f" * 40
    with pytest.raises(DownloadError, match="another revision"):
        get(model, store)
    hub.commit = model.transformer.revision
    if sha256:
        hub.sizes = {"vae.pth": 1000}
        with pytest.raises(WeightsError, match=r"vae\.pth .* has 1,000 bytes on the hub, but should have [\d,]{5,}\."):
            get(model, store)
    assert not [path for method, path, _ in hub.requests if method == "GET"]


def test_offline_says_so_and_works_with_what_is_here(hub: Hub, store: Store, model: Model, copy: Store, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()  # the mode is read when a session is opened
    try:
        with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set\. Unset it\. What has"):
            get(model, store)
        assert get(model, copy) == copy.model_folder(model)
    finally:
        close_session()


def test_too_small_a_disk_is_said_before_anything_is_fetched(hub: Hub, store: Store, model: Model, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, install.SPARE_BYTES + 10_000))
    with pytest.raises(
        DownloadError, match=r"needs 2[01]\d MB of free disk, and there are 200 MB.*SELF_FORCING_WEIGHTS"
    ):
        get(model, store)
    assert {method for method, _, _ in hub.requests} == {"HEAD"}


def test_the_disk_that_a_download_needs_is_counted_as_it_will_be_written(
    hub: Hub, store: Store, model: Model, published: Path
) -> None:
    """A transformer that is written in 16 bits takes half of its file; 8-bit matrices grow."""
    exact = load_manifest(published).parts["text-fp8"]
    model = model.with_part(exact)
    parts = [replace(part, dtype="bfloat16" if part is model.transformer else part.dtype) for part in model.parts]
    model = replace(model, parts=tuple(parts))
    plan = install.make_plan(model, store)
    get(model, store)
    for part in model.parts:
        written = sum(entry["bytes"] for entry in store.part_files(part).values())
        planned = install._converted_bytes(part, sum(file.bytes or 0 for file in part.files))
        assert written - 20_000 <= planned <= written + install.HEADER_BYTES, part.id
    transformer = sum(entry["bytes"] for entry in store.part_files(model.transformer).values())
    assert transformer < 0.6 * len(hub.files[BIG])
    assert plan.needed >= sum(entry["bytes"] for part in model.parts for entry in store.part_files(part).values())


def test_the_published_sizes_are_those_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest()
    monkeypatch.setattr(install, "remote_state", lambda part, file, size: SimpleNamespace(bytes=size, sha256=None))
    said = " ".join((ROOT / "docs" / "models.md").read_text().split())
    model = manifest.model("self-forcing-dmd")
    plan = install.make_plan(model, Store(tmp_path))
    assert f"{plan.total / 1e9:.1f} GB of download" in said
    assert f"{(plan.needed + install.SPARE_BYTES) / 1e9:.1f} GB of free disk" in said
    final = sum(install._converted_bytes(part, part.known_bytes or 0) for part in model.parts)
    assert f"{final / 1e9:.1f} GB remain" in said
    transformer = install._converted_bytes(model.transformer, 0)
    assert f"{transformer / 1e9:.1f} GB remain for each further model" in said
    with_fp8 = install.make_plan(model.with_part(manifest.parts["umt5-xxl-fp8"]), Store(tmp_path))
    assert f"{(with_fp8.needed + install.SPARE_BYTES) / 1e9:.1f} GB with it" in said


@pytest.mark.parametrize("room", [0, 10_000, 100_000])
def test_a_disk_that_fills_up_is_said_and_the_next_call_goes_on(
    hub: Hub, store: Store, model: Model, monkeypatch, room: int
) -> None:
    opened = hub_module._opened

    def full(path: Path) -> Any:
        stream = opened(path)
        left = [room]

        class Full:
            def write(self, data: bytes) -> int:
                if len(data) > left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                left[0] -= len(data)
                return stream.write(data)

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *exc_info: object) -> None:
                stream.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

        return Full()

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "_opened", full)
        with pytest.raises(DownloadError, match=r"disk is full in the middle of generator\.pt"):
            get(model, store)
    assert store.fetched_bytes(model.transformer, BIG) == room // 4096 * 4096
    get(model, store)
    assert store.presence(model) == "present"


def test_a_disk_that_fills_up_while_converting_leaves_the_download(hub: Hub, store: Store, model: Model, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("weights.convert.save_file", full)
        with pytest.raises(DownloadError, match="cannot be written.*No space left"):
            get(model, store)
    assert sorted(path.name for path in (store.home / ".parts").iterdir()) == []
    hub.requests.clear()
    get(model, store)
    assert not [path for _, path, _ in hub.requests if path.endswith(BIG)], "it was there already"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_download_goes_on(hub: Hub, store: Store, model: Model, published: Path, number: int) -> None:
    hub.bytes_per_second = 200_000
    arguments = ["download", "small", "--json", "--home", str(store.home), "--manifest", str(published)]
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM_WITH_SMALL_PIECES, *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.url},
        stdout=subprocess.PIPE,
        text=True,
    )
    partial = store.download_folder(model.transformer) / f"{BIG}.part"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 20_000, 60)
    child.send_signal(number)
    output, _ = child.communicate(timeout=30)
    begun = partial.stat().st_size
    assert 20_000 < begun < len(hub.files[BIG])
    if number == signal.SIGTERM:
        assert child.returncode == 130 and json.loads(output.splitlines()[-1])["code"] == 130
    hub.bytes_per_second = None
    hub.requests.clear()
    get(model, store)
    assert f"bytes={begun}-" in [wanted for _, path, wanted in hub.requests if path.endswith(BIG)]
    assert store.presence(model) == "present"


# ---- what is here


def test_a_bit_that_flipped_is_found_and_the_next_download_mends_it(hub: Hub, copy: Store, model: Model) -> None:
    assert verify(model, copy, lambda progress: None) >= 8
    path = copy.part_folder(model.transformer) / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.* of small has changed.*weights download small"):
        verify(model, copy, lambda progress: None)
    assert copy.presence(model) == "partial"
    folder = get(model, copy)
    assert {path.rsplit("/", 1)[1] for _, path, _ in hub.requests} == {BIG}
    assert (folder / "transformer" / path.name).samefile(path)
    verify(model, copy, lambda progress: None)


def test_a_model_that_is_not_here_is_not_verified(store: Store, model: Model) -> None:
    with pytest.raises(WeightsError, match=r"Small is not here. Get it with: python -m weights download small"):
        verify(model, store, lambda progress: None)


@pytest.mark.parametrize("name", ["small/model_index.json", "small/vae/config.json", ".parts/vae/config.json"])
def test_a_deleted_file_makes_it_partial_and_download_puts_it_back(hub: Hub, copy: Store, model: Model, name) -> None:
    (copy.home / name).unlink()
    assert copy.presence(model) == "partial"
    get(model, copy)
    assert copy.presence(model) == "present" and (copy.home / name).exists()


def test_removing_keeps_what_another_model_needs(hub: Hub, copy: Store, published: Path) -> None:
    manifest = load_manifest(published)
    small, other = manifest.model("small"), manifest.model("other")
    get(other, copy)
    copy.remove_model(small, manifest.parts.values(), [other])
    assert copy.presence(small) == "absent" and copy.presence(other) == "present"
    assert SelfForcingPipeline.from_pretrained(copy.model_folder(other), device="cpu").spec.name == "Other"
    assert copy.remove_model(other, manifest.parts.values(), [small]) > 0
    assert [path for path in copy.home.rglob("*") if path.suffix in (".safetensors", ".json")] == [copy._state_file]


def test_one_at_a_time(hub: Hub, store: Store, model: Model) -> None:
    with store.locked(), pytest.raises(DownloadError, match="Another download or removal is under way"):
        get(model, Store(store.home))


def test_a_folder_that_cannot_be_made_is_said(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be used.*SELF_FORCING_WEIGHTS"):
        get(model, Store(tmp_path / "file"))


def refuse_links(patch: pytest.MonkeyPatch, *names: str, code: int = errno.EPERM) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    for name in names:
        patch.setattr(os, name, refuse)


@pytest.mark.parametrize(("refused", "way"), [(["link"], "symbolic link"), (["link", "symlink"], "copy")])
def test_without_hard_links_there_are_others_or_copies(
    hub: Hub, store: Store, model: Model, monkeypatch, refused: list[str], way: str
) -> None:
    refuse_links(monkeypatch, *refused)
    said: list[str] = []
    folder = get(model, store, said=said)
    assert f"knows no hard links; each file of the model folder is a {way} instead" in said[0]
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert weights.is_symlink() == (way == "symbolic link")
    assert SelfForcingPipeline.from_pretrained(folder, device="cpu").spec.name == "Small"
    assert store.presence(model) == "present" and verify(model, store, lambda progress: None) >= 8
    hub.requests.clear()
    get(model, store)
    assert hub.requests == []
    content, before = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # or a copy counts as another file at once
    with pytest.raises(WeightsError, match="has changed"):
        verify(model, store, lambda progress: None)
    shutil.copytree(store.home, store.home.with_name("moved"), symlinks=True)
    shutil.rmtree(store.home)
    assert Store(store.home.with_name("moved")).remove_model(model, [], []) > 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_files_is_not_said_to_know_no_links(hub, store, model, monkeypatch, code: int) -> None:
    refuse_links(monkeypatch, "link", code=code)
    with pytest.raises(DownloadError, match=re.escape(os.strerror(code))):
        get(model, store)
    assert hub.requests == [], "nothing is fetched for nothing"


def test_without_the_recorded_hashes_nothing_is_fetched_again(hub: Hub, copy: Store, model: Model) -> None:
    copy._state_file.unlink()
    get(model, copy)
    assert copy.presence(model) == "present" and hub.requests == []


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"small": 3}', '{"small": {"source": {}}}', "\xff"])
def test_a_damaged_list_of_hashes_is_said_and_hinders_nothing_that_is_here(
    hub: Hub, copy: Store, store: Store, model: Model, content: str
) -> None:
    for place in (copy, store):
        place.home.mkdir(exist_ok=True)
        place._state_file.write_bytes(content.encode("latin-1"))
    assert copy.presence(model) == "present"
    with pytest.raises(WeightsError, match=r"\.state\.json .* cannot be read\. Delete it"):
        get(model, store)
    assert hub.requests == []


@pytest.mark.parametrize("content", ["", "[]", '{"revision": 3}', '{"files": []}', '{"files": {"config.json": null}}'])
def test_a_damaged_record_makes_its_part_come_again(hub: Hub, copy: Store, model: Model, content: str) -> None:
    record = copy.part_folder(model.transformer) / "record.json"
    revision = json.loads(record.read_text())["revision"]
    record.write_text(content.replace("{", f'{{"revision": "{revision}", ', 1) if "files" in content else content)
    assert copy.presence(model) == "partial"
    get(model, copy)
    assert {path.rsplit("/", 1)[1] for _, path, _ in hub.requests} == {BIG}
    assert copy.presence(model) == "present"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_note_that_cannot_be_written_is_one_sentence(hub: Hub, store: Store, model: Model, monkeypatch, code) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: full(path, target) if path.suffix == ".tmp" else None)
        with pytest.raises(DownloadError, match=r"cannot be written \(") as raised:
            get(model, store)
    assert ("Free some space" in str(raised.value)) == (code == errno.ENOSPC)


def test_a_disk_that_cannot_be_read_is_one_sentence(copy: Store, model: Model, monkeypatch) -> None:
    class Broken(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: Broken())
    with pytest.raises(WeightsError, match=r"cannot be read \(Input/output error\)\. The disk may be failing"):
        hub_module.sha256_of(copy.home / "small" / "model_index.json")


@pytest.mark.parametrize("value", [None, 3, "text-fp8", {"a": 1}, [None, ["text-fp8"], 3]])
def test_a_strange_index_is_made_anew(hub: Hub, copy: Store, published: Path, value: Any) -> None:
    manifest = load_manifest(published)
    index = copy.home / "small" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_parts": value}))
    model = copy.as_installed(manifest.model("small"), manifest)
    assert model == manifest.model("small") and copy.presence(model) == "partial"
    get(model, copy)
    assert copy.presence(model) == "present" and hub.requests == []


def test_settings_of_a_newer_manifest_arrive(hub: Hub, copy: Store, model: Model) -> None:
    newer = replace(model, settings=dict(model.settings) | {"shift": 8.0})
    assert copy.presence(newer) == "partial"
    folder = get(newer, copy)
    assert copy.presence(newer) == "present" and hub.requests == []
    assert SelfForcingPipeline.from_pretrained(folder, device="cpu").spec.shift == 8.0


def test_verify_looks_at_the_index_too(copy: Store, model: Model) -> None:
    index = copy.home / "small" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "Another"]}))
    with pytest.raises(WeightsError, match=r"model_index\.json of small has changed\. Put it right with: python -m"):
        verify(model, copy, lambda progress: None)


def test_verify_names_the_command_for_the_same_place(command, store: Store) -> None:
    code, _, err = command("verify", "small")
    assert code == 2
    places = f"--home {store.home} --manifest "
    assert f"Get it with: python -m weights download small {places}" in err


def test_a_download_goes_on_with_the_text_encoder_that_was_chosen(hub: Hub, command, store: Store) -> None:
    hub.status = {"vae.pth": 500}  # after the text encoder
    assert command("download", "small", "--text-encoder", "text-fp8")[0] == 1
    hub.status = {}
    hub.cuts = [0] * 9
    assert command("download", "small", "--text-encoder", "text-fp8")[0] == 1
    hub.cuts = []
    assert command("download", "small")[0] == 0
    parts = {path.name for path in (store.home / ".parts").iterdir()}
    assert "text-fp8" in parts and "text" not in parts
    assert not list((store.home / ".downloads").iterdir())


def test_a_text_encoder_stays_until_the_other_one_has_come(hub: Hub, command, store: Store) -> None:
    assert command("download", "small")[0] == 0
    hub.cuts = [1000] + [0] * 9
    assert command("download", "small", "--text-encoder", "text-fp8")[0] == 1
    hub.cuts = []
    assert command("download", "other")[0] == 0 and command("remove", "other")[0] == 0
    hub.requests.clear()
    assert command("download", "small", "--text-encoder", "text")[0] == 0
    assert hub.requests == [] and command("verify", "small")[0] == 0


def test_removing_leaves_no_part_of_a_download_that_never_ended(hub: Hub, command, store: Store) -> None:
    assert command("download", "small")[0] == 0
    hub.cuts = [1000] + [0] * 9
    assert command("download", "small", "--text-encoder", "text-fp8")[0] == 1
    assert (store.home / ".downloads" / "text-fp8").exists()
    assert "free again" in command("remove", "small")[1]
    assert not any((store.home / ".parts").iterdir()) and not any((store.home / ".downloads").iterdir())
    assert "nothing to remove" in command("remove", "small")[1]


def test_what_cannot_be_removed_is_not_said_to_be(hub: Hub, command, store: Store, monkeypatch) -> None:
    assert command("download", "small")[0] == 0

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    code, out, err = command("remove", "small")
    assert code == 1 and "Removed" not in out and "small cannot be removed (Permission denied)" in err


def test_speed_and_time_left() -> None:
    now, seen = [0.0], []
    meter = Meter(1000, seen.append, clock=lambda: now[0])
    meter.stage("Downloading")
    meter.skip(500)
    for _ in range(5):
        now[0] += 1
        meter.advance(50)
    assert seen[-1].done == 750 and seen[-1].speed == pytest.approx(50) and seen[-1].seconds_left == pytest.approx(5)
    assert "750 B of 1 kB · 50 B/s · 5 s left" in str(seen[-1])


# ---- the command line


@pytest.fixture
def command(published: Path, store: Store, capfd) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str, home: Path | None = None) -> tuple[int, str, str]:
        where = ["--home", str(home or store.home), "--manifest", str(published)] if arguments[0] != "convert" else []
        code = cli.main([*arguments, *where])
        return code, *capfd.readouterr()

    return run


def test_commands(hub: Hub, command, store: Store) -> None:
    assert "not here" in command("list")[1]
    code, out, err = command("download", "small")
    assert code == 0 and "Test-1.0" in err and "python app.py --model" in out
    rows = json.loads(command("list", "--json")[1])
    assert [(row["id"], row["state"]) for row in rows] == [("small", "present"), ("other", "absent")]
    assert "Do as you like" in command("info", "small")[1]
    assert command("verify", "small")[1].startswith("All ")
    code, out, _ = command("download", "small", "--text-encoder", "text-fp8", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["event"] == "done"
    assert not (store.home / ".parts" / "text").exists() and (store.home / ".parts" / "text-fp8").exists()
    assert {part["id"] for part in json.loads(command("info", "small", "--json")[1])["parts"]} >= {"text-fp8", "vae"}
    assert "free again" in command("remove", "small")[1]
    assert command("verify", "small")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["download", "large"], 2, "There is no model 'large'. Choose one of: small, other."),
        (["download", "small", "--text-encoder", "vae"], 2, "There is no text encoder 'vae'. Choose one of: text"),
        (["verify", "small"], 2, "Small is not here."),
        (["convert", "nothing.pt", "out"], 2, "There is no file 'nothing.pt'."),
        (["fetch", "small"], 2, "Argument COMMAND: invalid choice"),
    ],
)
def test_mistakes_are_one_sentence(command, arguments: list[str], code: int, sentence: str) -> None:
    found, out, err = command(*arguments) if arguments[0] != "fetch" else (cli.main(arguments), "", None)
    assert found == code
    if err is not None:
        assert sentence in err and "Traceback" not in err and out == ""


def test_what_the_hub_refuses_is_exit_code_1(hub: Hub, command) -> None:
    hub.status = {BIG: 500}
    code, out, _ = command("download", "small", "--json")
    assert code == 1 and json.loads(out.splitlines()[-1])["event"] == "error"


@pytest.mark.parametrize("fault", ["cut", "refused", "wrong", "offline", "full", "state"])
def test_what_goes_on_names_its_command_and_a_program_is_told_that_it_does(
    hub: Hub, command, store: Store, published: Path, monkeypatch, fault: str
) -> None:
    if fault == "cut":
        hub.cuts = [1000] + [0] * 20
    elif fault == "refused":
        hub.status = {BIG: 503}
    elif fault == "wrong":
        hub.files[BIG] = hub.files[BIG][:-1] + b"x"
    elif fault == "offline":
        from huggingface_hub.utils import close_session

        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        close_session()
    elif fault == "full":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 1000))
    else:
        store.home.mkdir(parents=True)
        store._state_file.write_text("{")
    try:
        code, _, err = command("download", "small", "--text-encoder", "text-fp8")
        where = f"--home {store.home} --manifest {published}"
        said = err.strip().splitlines()[-1]
        assert code and said.endswith(
            f". Go on with `python -m weights download small --text-encoder text-fp8 {where}`."
        )
        hub.cuts = [0] * 20 if fault == "cut" else []
        _, out, _ = command("download", "small", "--text-encoder", "text-fp8", "--json")
        event = json.loads(out.splitlines()[-1])
        assert event["resumable"] and "python -m weights" not in event["message"]
    finally:
        if fault == "offline":
            close_session()


def test_what_would_fail_again_names_no_command(hub: Hub, command) -> None:
    hub.status, hub.error_code = {BIG: 404}, "RevisionNotFound"
    code, _, err = command("download", "small")
    assert code == 1 and "python -m" not in err
    assert not json.loads(command("download", "small", "--json")[1].splitlines()[-1])["resumable"]


def test_no_token_is_ever_shown(hub: Hub, command, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    hub.status, hub.error_code = {"vae.pth": 403}, "GatedRepo"
    code, out, err = command("download", "small")
    assert code == 1 and "canary" not in out + err


def test_convert_makes_a_transformer_folder(command, published: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    config = str(published.parent / "transformer.json")
    source = str(published.parent / "files" / BIG)
    code, said, _ = command("convert", source, str(out), "--config", config, "--dtype", "bfloat16", "--json")
    assert code == 0 and json.loads(said)["event"] == "done"
    assert {path.name for path in out.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert load_file(out / "diffusion_pytorch_model.safetensors")["proj_out.weight"].dtype == torch.bfloat16
    code, _, err = command("convert", source, str(out), "--config", config)
    assert code == 2 and "exists already" in err
    code, _, err = command("convert", source, str(tmp_path / "no"), "--config", config, "--key", "critic")
    assert code == 2 and "no entry 'critic'; it has generator_ema, generator" in err
    code, _, err = command("convert", source, str(tmp_path / "no"))
    assert code == 2 and "do not fit the model" in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("no", "no.partial")) == []


def test_videos_of_two_downloads_are_equal(downloaded: Path, hub: Hub, store: Store, model: Model) -> None:
    again = get(model, store)
    request = GenerationRequest(prompt="a blue car", seed=3, seconds=1)
    one, two = (
        SelfForcingPipeline.from_pretrained(folder, device="cpu").generate(request).frames
        for folder in (downloaded / "small", again)
    )
    assert np.array_equal(one, two)
    assert tree(downloaded / "small") == tree(again)
