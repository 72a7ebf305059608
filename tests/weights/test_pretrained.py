# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Loading weights from files, hubs and addresses: all of them, or an error and no change."""

import hashlib
import http.server
import json
import ssl
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from errors import UserError
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from parallel import process_group
from tests import tiny
from weights import download
from weights.convert import to_hf, to_official, to_timm
from weights.files import read_checkpoint
from weights.pretrained import EMA_KEY, load_pretrained, read_pretrained

SIZE = ((1, 1, 1, 1), (4, 6, 8, 10))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def classifier(seed: int = 0, classes: int = 3, **kwargs) -> ConvNeXtV2:
    return randomize(ConvNeXtV2(*SIZE, num_classes=classes), seed, **kwargs)


def autoencoder(seed: int = 0) -> FCMAE:
    return randomize(FCMAE(ConvNeXtV2(*SIZE), decoder_embed_dim=8), seed)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- files ------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [dict, to_timm, to_hf, to_official])
@pytest.mark.parametrize("file", ["a.pth", "a.pt", "a.bin", "a.safetensors", "named as it likes"])
def test_every_layout_in_every_kind_of_file(tmp_path, convert, file):
    state = convert(classifier().state_dict())
    if "safetensors" in file:
        save_file(state, tmp_path / file)
    else:
        torch.save(state if "bin" in file else {"model": state}, tmp_path / file)
    model = classifier(seed=1)
    load_pretrained(model, str(tmp_path / file), new=())
    assert_same(values(model), values(classifier()))


def test_folder_of_a_hub_model_stands_for_its_weights(tmp_path):
    save_file(to_hf(classifier().state_dict()), tmp_path / "model.safetensors")
    model = classifier(seed=1)
    load_pretrained(model, str(tmp_path))
    assert_same(values(model), values(classifier()))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder in which transformers has saved a model in several files."""
    import transformers

    config = transformers.ConvNextV2Config(
        depths=list(SIZE[0]), hidden_sizes=list(SIZE[1]), num_labels=3, layer_norm_eps=1e-6
    )
    model = transformers.ConvNextV2ForImageClassification(config)
    model.load_state_dict(to_hf(classifier().state_dict()))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-0*.safetensors"))) > 1
    return tmp_path / "sharded"


def test_folder_of_a_hub_model_in_parts(sharded):
    model = classifier(seed=1)
    load_pretrained(model, str(sharded), new=())
    assert_same(values(model), values(classifier()))
    again = classifier(seed=1)
    load_pretrained(again, str(sharded / "model.safetensors.index.json"), new=())
    assert_same(values(again), values(classifier()))


def test_hub_model_in_parts(hub, sharded, tmp_path):
    folder = tmp_path / "models--someone--large"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots").mkdir()
    sharded.rename(folder / "snapshots" / "c0ffee")
    model = classifier(seed=1)
    load_pretrained(model, "hf-hub:someone/large", new=())
    assert_same(values(model), values(classifier()))


def rewrite(index: Path, **files: str) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= files
    index.write_text(json.dumps(content))


def test_incomplete_or_odd_parts_are_refused(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    whole = tmp_path / "model-00001-of-00001.safetensors"  # as whole as any other
    save_file({"a": torch.ones(1)}, whole)
    assert read_checkpoint(whole).keys() == {"a"}
    with pytest.raises(UserError, match="--sha256 needs a file"):
        read_checkpoint(index, "0" * 64)
    rewrite(index, more=sorted({*json.loads(text)["weight_map"].values()})[0])
    with pytest.raises(UserError, match="hold different tensors: more; download"):
        read_checkpoint(sharded)
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    for name in ("../a.pth", str(tmp_path / "a.pth"), "..\\a.pth"):  # of another folder
        rewrite(index, a=name)
        with pytest.raises(UserError, match="names files outside of its own folder"):
            read_checkpoint(sharded)
    for damaged in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match=r"index\.json is damaged .*expected a JSON weight_map"):
            read_checkpoint(sharded)
    index.write_text(text)
    part, *_ = sharded.glob("model-0*")
    with pytest.raises(UserError, match=r"model-0\d+-of-0\d+.safetensors is one of \d parts"):
        read_checkpoint(part)  # which was called weights of other flags
    part.unlink()
    name = r"model-0\S+\.safetensors is missing; model.safetensors.index.json lists it"
    with pytest.raises(UserError, match=name):
        read_checkpoint(sharded)


def test_ema_weights_are_loaded_by_their_key(tmp_path):
    state, ema = classifier().state_dict(), classifier(seed=2).state_dict()
    torch.save({"model": state, "model_ema": ema}, tmp_path / "a.pth")
    model = classifier(seed=1)
    load_pretrained(model, str(tmp_path / "a.pth"), EMA_KEY)
    assert_same(values(model), values(classifier(seed=2)))


@pytest.mark.parametrize("ema", [{}, {"model_ema": None}])
def test_missing_ema_weights_are_an_error(tmp_path, ema):
    torch.save({"model": classifier().state_dict(), **ema}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="expected weights under 'model_ema"):
        load_pretrained(classifier(), str(tmp_path / "a.pth"), EMA_KEY)


def test_has_ema(tmp_path):
    for name, content in {
        "both": {"model": {}, "model_ema": classifier().state_dict()},
        "none": {"model": classifier().state_dict(), "model_ema": None},
        "bare": classifier().state_dict(),
    }.items():
        torch.save(content, tmp_path / name)
        ema = read_pretrained(str(tmp_path / name)).ema
        assert (ema is not None) == (name == "both")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_model_of_a_fork_loads_its_own_names(tmp_path, prefix):
    """Unknown names used to be refused even if they fitted the model."""
    source, target = tiny.Other(3), tiny.Other(3)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    load_pretrained(target, str(tmp_path / "a.pth"), new=())
    assert_same(values(target), values(source))
    torch.save(classifier().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth does not fit Other: 2 missing"):
        load_pretrained(target, str(tmp_path / "a.pth"))


def test_model_of_a_fork_loads_the_encoder_of_its_autoencoder(tmp_path):
    target, source = tiny.Other(3), tiny.Other(3)
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    torch.save(state | {"pred.weight": torch.zeros(2)}, tmp_path / "a.pth")
    assert load_pretrained(target, str(tmp_path / "a.pth")).dropped == ["pred.weight"]
    assert_same(values(target), values(source))


def test_ema_key_selects_the_best_ema_checkpoint_of_a_folder(tmp_path, lines):
    for name, seed in (("checkpoint-best.pth", 2), ("checkpoint-best-ema.pth", 3)):
        state = classifier(seed=seed).state_dict()
        torch.save({"model": state, "model_ema": state}, tmp_path / name)
    for key, seed in ((EMA_KEY, 3), ("model", 2)):
        model = classifier(seed=1)
        load_pretrained(model, str(tmp_path), key)
        assert_same(values(model), values(classifier(seed=seed)))
    assert any("checkpoint-best-ema.pth (official layout)" in line for line in lines())


# --- reports ----------------------------------------------------------------------------


def test_report_names_new_and_dropped_parts(tmp_path, lines):
    torch.save({"model": to_timm(classifier(classes=5).state_dict())}, tmp_path / "a.pth")
    model = classifier(seed=1)
    report = load_pretrained(model, str(tmp_path / "a.pth"))
    assert report.layout == "timm"
    assert report.dropped == ["head.weight", "head.bias"]
    assert report.missing == ["head.weight", "head.bias"]
    assert len(report.loaded) == len(model.state_dict()) - 2
    warning, summary = lines()
    assert warning.endswith("its head has 5 classes, so the model gets a new head")
    path = tmp_path / "a.pth"
    assert summary == f"loaded 58 tensors from {path} (timm layout; new: head; dropped: head)"
    expected = values(classifier(classes=5))
    for name, value in model.state_dict().items():
        wanted = values(classifier(seed=1)) if name.startswith("head.") else expected
        assert torch.equal(value, wanted[name]), name


def test_head_that_does_not_fit_is_an_error_in_evaluation(tmp_path):
    torch.save(classifier(classes=5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"head\.weight \(5, 10\) instead of \(3, 10\)"):
        load_pretrained(classifier(), str(tmp_path / "a.pth"), new=())


def test_incomplete_head_is_an_error(tmp_path):
    """A head.weight without its bias used to be combined with a random bias."""
    state = classifier().state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 missing \(head\.bias\)"):
        load_pretrained(classifier(), str(tmp_path / "a.pth"))


def test_encoder_alone_loads_into_an_autoencoder_with_a_new_decoder(tmp_path):
    save_file(to_timm(autoencoder().encoder.state_dict()), tmp_path / "a.safetensors")
    model = autoencoder(seed=1)
    report = load_pretrained(model, str(tmp_path / "a.safetensors"))
    assert_same(values(model.encoder), values(autoencoder().encoder))
    assert {name.split(".")[0] for name in report.missing} == {
        *("proj", "mask_token", "decoder", "pred")
    }


def test_decoder_of_another_width_is_an_error(tmp_path):
    other = FCMAE(ConvNeXtV2(*SIZE), decoder_embed_dim=16)
    torch.save(other.state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"proj\.weight \(16, 10, 1, 1\) instead of \(8, 10, 1, 1\)"
    ):
        load_pretrained(autoencoder(), str(tmp_path / "a.pth"))


@pytest.mark.parametrize(("scale", "warned"), [(0.88, True), (0.1, False)])
def test_large_weights_of_the_official_initialization_give_a_warning(
    tmp_path, lines, scale, warned
):
    """Weights pre-trained by the official script overflow fp16, and the loss is NaN."""
    torch.save(classifier(scale=scale).state_dict(), tmp_path / "a.pth")
    load_pretrained(classifier(), str(tmp_path / "a.pth"))
    warnings = [line for line in lines() if "weights is 0.8" in line and "--amp bf16" in line]
    assert bool(warnings) == warned


def with_nan(state: dict, name: str, value: float = float("nan")) -> dict:
    """The state with one value that is not finite in a tensor."""
    broken = state[name].clone()
    broken.view(-1)[-1] = value
    return state | {name: broken}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model", EMA_KEY])
@pytest.mark.parametrize("new", [(), ("norm.", "head.")], ids=["evaluation", "fine-tuning"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, key, new):
    """--eval of them used to report 50% of two classes, since NaN counts as class 0."""
    good, bad = classifier().state_dict(), classifier().state_dict()
    for name in ("stages.1.0.dwconv.bias", "head.bias"):
        bad = with_nan(bad, name, value)
    pair = (bad, good) if key == "model" else (good, bad)
    torch.save(dict(zip(("model", "model_ema"), pair, strict=True)), tmp_path / "a.pth")
    model = classifier(seed=1)
    message = r"a\.pth holds NaN or Inf in stages\.1\.0\.dwconv\.bias, head\.bias: .*earlier"
    with pytest.raises(UserError, match=message):
        load_pretrained(model, str(tmp_path / "a.pth"), key, new=new)
    assert_same(values(model), values(classifier(seed=1)))


def test_nan_in_a_part_that_is_dropped_does_no_harm(tmp_path):
    state = with_nan(autoencoder().state_dict(), "pred.bias")
    torch.save(state, tmp_path / "a.pth")
    load_pretrained(classifier(seed=1), str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match=r"NaN or Inf in pred\.bias"):
        load_pretrained(autoencoder(seed=1), str(tmp_path / "a.pth"))


class Normed(torch.nn.Module):
    """A network with BatchNorm and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3)
        self.register_buffer("mask_bias", torch.tensor([0.0, float("-inf")]))


def test_buffers_with_inf_load_and_ruined_statistics_do_not(tmp_path):
    """A mask of -inf is intended; with a running mean of NaN every output is NaN."""
    huge = {"head.weight": torch.full((3, 2), 3e38)}  # finite, though their sum is not
    torch.save(Normed().state_dict() | huge, tmp_path / "a.pth")
    load_pretrained(Normed(), str(tmp_path / "a.pth"), new=())
    read_pretrained(str(tmp_path / "a.pth")).check_values()
    ruined = Normed().state_dict() | {"bn.running_mean": torch.tensor([0.0, float("nan")])}
    torch.save(ruined, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"NaN or Inf in bn\.running_mean: "):
        load_pretrained(Normed(), str(tmp_path / "a.pth"), new=())


@pytest.mark.parametrize("uses_buffers", [False, True])
@pytest.mark.parametrize("build", [classifier, lambda seed: randomize(tiny.Other(3), seed)])
def test_averages_of_torch_swa_utils_load(tmp_path, uses_buffers, build):
    """Their counter n_averaged used to be an unexpected tensor."""
    average = torch.optim.swa_utils.AveragedModel(build(seed=2), use_buffers=uses_buffers)
    torch.save({"model": average.state_dict()}, tmp_path / "a.pth")
    model = build(seed=1)
    load_pretrained(model, str(tmp_path / "a.pth"), new=())
    assert_same(values(model), values(build(seed=2)))


def test_check_finds_what_loading_would_find_and_changes_nothing(tmp_path, lines):
    """A wrong --finetune used to be found after the data had been listed."""
    torch.save(classifier(classes=5).state_dict(), tmp_path / "a.pth")
    with torch.device("meta"):
        model = ConvNeXtV2(*SIZE, num_classes=3)
    weights = read_pretrained(str(tmp_path / "a.pth"))
    weights.check(model)
    assert lines() == []
    with pytest.raises(UserError, match="5 classes and this model has 3"):
        weights.check(model, new=())
    with pytest.raises(UserError, match="does not exist"):
        read_pretrained(str(tmp_path / "b.pth"))


# --- downloads --------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that cannot be reached, with a cache of two models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for owner, name, file in (
        ("timm", "convnextv2_atto.fcmae", "model.safetensors"),
        ("someone", "theirs", "pytorch_model.bin"),
    ):
        folder = tmp_path / f"models--{owner}--{name}"
        (folder / "snapshots" / "c0ffee").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c0ffee")
        state = to_timm(classifier().state_dict())
        if file.endswith("bin"):
            torch.save(state, folder / "snapshots" / "c0ffee" / file)
        else:
            save_file(state, folder / "snapshots" / "c0ffee" / file)


@pytest.mark.parametrize(
    "source",
    ["timm:convnextv2_atto.fcmae", "hf-hub:timm/convnextv2_atto.fcmae", "hf-hub:someone/theirs"],
)
def test_cached_hub_models_load_offline(hub, source):
    model = classifier(seed=1)
    load_pretrained(model, source)
    assert_same(values(model), values(classifier()))


def test_json_files_of_a_hub_model_are_downloaded_too_if_it_has_them(tmp_path, monkeypatch):
    """Without them its class names would be unknown."""
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download_file(repository: str, file: str, revision: str | None) -> str:
        asked.append(file)
        if file == "config.json":
            raise EntryNotFoundError("none")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_file)
    assert download.locate("hf-hub:someone/model") == tmp_path / "model.safetensors"
    assert asked == ["model.safetensors", "config.json", "preprocessor_config.json"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf-hub:someone/nothing", "found no model.safetensors or pytorch_model.bin .*local cache"),
        ("timm:convnextv2_tiny.fcmae", "local cache.*check the name and the network"),
        ("timm:convnextv2_tny.fcmae", "Did you mean 'convnextv2_tiny.fcmae'"),
        ("hf-hub:owner/two/many", "hf-hub:owner/two/many: .*check the name"),
        ("http://example.com/a.pth", "expected a file, a folder, hf-hub"),
        ("https://localhost:1/a.pth", "https://localhost:1/a.pth: .*check address and network"),
    ],
)
def test_unavailable_sources_are_explained(hub, source, message):
    model = classifier(seed=1)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(model, source)
    assert "\n" not in str(caught.value)
    assert_same(values(model), values(classifier(seed=1)))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An https server on this machine with a file a.pth; yields its address and the file."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    served = tmp_path / "served"
    served.mkdir()
    torch.save({"model": classifier().state_dict()}, served / "a.pth")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    service = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    service.socket = context.wrap_socket(service.socket, server_side=True)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield f"https://localhost:{service.server_port}/a.pth", served / "a.pth"
    service.shutdown()
    service.server_close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_https_address_with_its_hash(server, lines):
    address, file = server
    model = classifier(seed=1)
    load_pretrained(model, address, sha256=sha256(file))
    assert_same(values(model), values(classifier()))
    file.unlink()  # the second time it is in the cache
    again = classifier(seed=1)
    load_pretrained(
        again, address, sha256=download.locate(address) and sha256(download.locate(address))
    )
    assert_same(values(again), values(classifier()))
    assert sum("was not verified" in line for line in lines()) == 2  # by locate alone


def test_https_address_with_another_hash_leaves_nothing(server, tmp_path):
    address, _ = server
    with pytest.raises(UserError, match="invalid hash value"):
        read_checkpoint(address, "0" * 64)
    assert not list((tmp_path / "torch").rglob("*.pth"))
    read_checkpoint(address)
    with pytest.raises(UserError, match=f"expected {'0' * 64}: it is another file or damaged"):
        read_checkpoint(address, "0" * 64)  # the one in the cache


def test_hash_of_local_files_is_checked_too(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth", sha256(tmp_path / "a.pth").upper())
    for wrong, message in (("0" * 64, "has SHA-256"), ("12", "expected 12")):
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / "a.pth", wrong)
    with pytest.raises(UserError, match="needs a file"):
        read_checkpoint(tmp_path, "0" * 64)


# --- bad files --------------------------------------------------------------------------


def truncated(path: Path) -> None:
    torch.save({"model": classifier().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_safetensors(path: Path) -> None:
    save_file(classifier().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat.jpg", b"no picture")


def transposed(path: Path) -> None:
    state = classifier().state_dict()
    state["stages.2.0.pwconv1.weight"] = state["stages.2.0.pwconv1.weight"].T
    torch.save(state, path)


BAD = {
    "truncated": (truncated, "truncated, damaged or not a checkpoint"),
    "truncated safetensors": (truncated_safetensors, "truncated, damaged or not a checkpoint"),
    "text": (lambda path: path.write_text("some notes\n"), "begins with b'some note"),
    "zip": (a_zip, "truncated, damaged or not a checkpoint"),
    "nothing in it": (lambda path: torch.save({}, path), "expected weights under"),
    "no weights": (lambda path: torch.save({"model": {}}, path), "expected weights under"),
    "a list": (lambda path: torch.save([1, 2], path), "contains list; expected weights"),
    "resnet": (
        lambda path: torch.save({"model": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, path),
        "not weights of a ConvNeXt V2 or V1, with names like conv1.weight",
    ),
    "transposed": (transposed, r"pwconv1\.weight \(8, 32\) instead of \(32, 8\)"),
    "absent": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("build", [classifier, autoencoder])
def test_bad_file_gives_a_one_line_error_and_changes_nothing(tmp_path, case, build):
    write, message = BAD[case]
    write(tmp_path / "bad.pth")
    model = build(seed=1)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(model, str(tmp_path / "bad.pth"))
    assert str(caught.value).count("bad.pth") == 1
    assert "\n" not in str(caught.value)
    assert_same(values(model), values(build(seed=1)))


def test_error_of_the_main_process_is_raised_on_all_ranks(monkeypatch):
    """Otherwise the others would wait for a failed download."""
    calls = []
    monkeypatch.setattr(process_group, "is_main_process", lambda: False)
    monkeypatch.setattr(process_group, "broadcast", lambda value: (None, "no network"))
    with pytest.raises(UserError, match="no network"):
        process_group.main_process_first(lambda: calls.append(1))
    assert not calls


def test_lack_of_memory_is_not_a_damaged_file(tmp_path, monkeypatch):
    """The newest checkpoint was renamed to .damaged, and an older one resumed."""
    torch.save({"model": {}}, tmp_path / "a.pth")

    def full(*args, **kwargs):
        raise RuntimeError("unable to mmap 800 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError, match="not enough memory to map"):
        read_checkpoint(tmp_path / "a.pth")
