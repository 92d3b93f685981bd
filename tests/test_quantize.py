"""Quantized models in the engine: directories, widths, and what can be wrong with them."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from pyruntime import LLM, errors
from pyruntime.__main__ import main
from pyruntime.engine.calibrate import calibrate
from pyruntime.engine.loader import DENSE, HEAD, Checkpoint
from pyruntime.engine.quantize import LAYOUTS, compare_schemes, quantize
from pyruntime.engine.runner import Engine
from pyruntime.kv import ReferenceBlockPool
from pyruntime.models import shipped
from pyruntime.moe import ExpertStore, schemes
from tests.stepping import CASES, DATA, Bench, reference

TEXT = (
    "The pool keeps objects of one size. A thread takes an object from its own cache and gives it "
    "back there; caches exchange magazines with a depot. When the depot is empty, the pool grows.\n"
) * 12


class QuantizedBench(Bench):
    """As Bench, over a quantized directory."""

    def __init__(self, directory, bits=None, num_blocks=64, block_size=4):
        self.engine = Engine.load(directory, num_blocks, block_size, bits=bits)
        self.layers = self.engine.config.num_layers
        self.pool = ReferenceBlockPool(num_blocks, block_size, self.layers)
        self.plans = 0


def kl(logits, other):
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(logits), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model that ships, quantized."""
    out = tmp_path_factory.mktemp("q") / "tiny.mxs"
    quantize(shipped(), out)
    return out


def logits_at(bench, tokens, lengths):
    """Logits after each of some prefixes."""
    rows = []
    for request, length in enumerate(lengths):
        bench.add(request, tokens[:length])
        rows.append(bench.prefill(request, return_logits=True).logits[0])
        bench.engine.remove(request)
        bench.pool.free(request)
    return np.array(rows)


@pytest.mark.parametrize("case", CASES)
def test_experts_of_eight_bits_are_close_to_float(case, tmp_path):
    quantize(DATA / case, tmp_path / "q", layout="44")
    known = reference(case)
    tokens = np.concatenate([known["prompt"], known["tokens"]])
    lengths = range(8, 100, 4)
    exact = logits_at(Bench(case, num_blocks=256), tokens, lengths)
    got = logits_at(QuantizedBench(tmp_path / "q", num_blocks=256), tokens, lengths)
    # With random weights a token now and then is close to two experts' border and takes the other
    # one; its logits are then another matter than precision.
    assert np.median(kl(exact, got)) < 1e-3
    assert kl(exact, got).mean() < 2e-2
    coarse = logits_at(QuantizedBench(tmp_path / "q", 4, num_blocks=256), tokens, lengths)
    assert kl(exact, got).mean() < kl(exact, coarse).mean() < 1.0


def test_dense_matrices_of_eight_bits(tmp_path):
    for case in ("qwen3moe_mixed", "qwen2moe"):
        report = quantize(DATA / case, tmp_path / case, dense_bits=8)
        assert report.dense and max(report.dense.values()) < 1e-4
        known = reference(case)
        tokens = np.concatenate([known["prompt"], known["tokens"]])
        lengths = range(8, 100, 4)
        bench = QuantizedBench(tmp_path / case, num_blocks=256)
        assert bench.engine.weights.layers[0].qkv.bits == [8]
        exact = logits_at(Bench(case, num_blocks=256), tokens, lengths)
        assert np.median(kl(exact, logits_at(bench, tokens, lengths))) < 3e-3


def test_error_falls_with_width_and_bytes_rise(tiny):
    report = json.loads((tiny / "quantization.json").read_text())
    assert report["bits"] == LAYOUTS["2222"]
    assert report["relative_error"] == sorted(report["relative_error"], reverse=True)
    assert report["bits_per_weight"] == sorted(report["bits_per_weight"])
    assert (tiny / "quantization.svg").read_text().count("<polyline") == 4
    used = []
    for bits in (2, 4, 6, 8):
        bench = QuantizedBench(tiny, bits)
        bench.add(0, [1, 2, 3])
        result = bench.prefill(0)
        per_expert = [bench.engine.experts.expert_bytes(layer) for layer in range(4)]
        experts = (result.expert_tokens > 0).sum(axis=1)
        assert result.expert_bytes.tolist() == (experts * per_expert).tolist()
        used.append(bench.engine.experts.stats()["resident_bytes"])
    assert used == sorted(used) and used[0] < 0.4 * used[3]


def test_prefill_and_decode_are_bit_equal(tiny):
    for bits in (2, 4, 6, 8):
        bench = QuantizedBench(tiny, bits, block_size=16)
        prompt = list(range(5, 45))
        bench.add(0, prompt)
        tokens, logits = bench.greedy(0, 6)
        again = logits_at(
            QuantizedBench(tiny, bits, block_size=16),
            np.array(prompt + tokens),
            range(len(prompt), len(prompt) + 6),
        )
        np.testing.assert_array_equal(logits, again)


def test_as_a_library_and_batches_change_nothing(tiny):
    prompts = ["The list is", "A function that", "Pools of"]
    with LLM(tiny, bits=4) as llm:
        together = llm.generate(prompts, max_tokens=12)
        alone = [llm.generate([prompt], max_tokens=12)[0] for prompt in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    with pytest.raises(errors.InvalidArgumentError, match="quantize"):
        LLM(shipped(), bits=4)
    with pytest.raises(errors.InvalidArgumentError, match="5 bits"):
        LLM(tiny, bits=5)


def test_calibration_weighs_the_errors(tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    importance = calibrate(shipped(), text, num_tokens=300)
    weighing = importance.of(0, 0, 0)
    assert weighing.shape == (256,) and weighing.min() >= 0 and weighing.max() > 0
    assert importance.of(3, 7, 2).shape == (256,)
    report = quantize(shipped(), tmp_path / "q", layout="422", importance=importance)
    assert report.calibrated
    text.write_text("short")
    with pytest.raises(errors.InvalidArgumentError, match="32 or more"):
        calibrate(shipped(), text)


def test_what_quantize_refuses_leaves_nothing(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DATA / "qwen3moe", model)
    with pytest.raises(errors.InvalidArgumentError, match="exists"):
        quantize(model, model)
    with pytest.raises(errors.InvalidArgumentError, match="layout"):
        quantize(model, tmp_path / "q", layout="3")
    checkpoint = Checkpoint(model)
    name = next(n for n in checkpoint.names if "experts.1.up_proj" in n)
    tensors = {n: checkpoint.read(n, checkpoint.entry(n)[1]) for n in checkpoint.names}
    tensors[name][3, 2] = np.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(errors.InvalidArgumentError, match=r"experts\.1\.up_proj.*\[3, 2\]"):
        quantize(model, tmp_path / "q")
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(DATA / "qwen3moe", tmp_path / "q", progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    from pyruntime.moe import StoreWriter

    def full(self):
        raise errors.StorageError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "commit", full)
    with pytest.raises(errors.StorageError, match="space"):
        quantize(DATA / "qwen3moe", tmp_path / "q")
    assert os.listdir(tmp_path) == []


def test_files_of_different_models_do_not_run_together(tmp_path):
    quantize(DATA / "qwen3moe", tmp_path / "a")
    quantize(DATA / "qwen3moe_llama3", tmp_path / "b")
    shutil.copyfile(tmp_path / "b" / "experts.mxs", tmp_path / "a" / "experts.mxs")
    with pytest.raises(errors.CorruptDataError, match="another model"):
        Engine.load(tmp_path / "a", 8)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    config[key] += 1
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.CorruptDataError, match="config says"):
        Engine.load(tmp_path / "b", 8)


def test_a_damaged_store_is_refused_with_its_place(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "q")
    path = tmp_path / "q" / "experts.mxs"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(errors.CorruptDataError, match="truncated"):
        LLM(tmp_path / "q")
    path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:])
    with pytest.raises(errors.CorruptDataError, match="layer 0, expert 0"):
        LLM(tmp_path / "q")


def test_the_command_tells_progress_and_a_table(tmp_path, capsys):
    out = tmp_path / "q.mxs"
    assert (
        main(["quantize", str(DATA / "qwen3moe"), str(out), "--layout", "422", "--dense", "8"]) == 0
    )
    told = capsys.readouterr()
    assert "layer 1/" in told.err
    assert "4/4/4" in told.out and "dense" in told.out
    assert sorted(os.listdir(tmp_path)) == ["q.mxs"]
    assert main(["quantize", str(DATA / "qwen3moe"), str(out)]) == 1


def test_nested_beats_binary_planes_once_they_are_stacked():
    errors_of = compare_schemes(shipped())
    assert list(errors_of) == ["nested", "binary from 2", "binary from 4"]
    for scheme in errors_of.values():
        assert sorted(scheme.values(), reverse=True) == list(scheme.values())
    ours, from_two, from_four = errors_of.values()
    for width in (4, 6, 8):
        assert ours[width] < from_two[width]
    assert ours[8] < 0.6 * from_four[8] and ours[8] < 0.3 * from_two[8]


def test_binary_planes_by_hand():
    weights = np.array([[0.0, 3.0, 1.25, 1.75]], np.float32)
    planes = schemes.binary_planes(weights, [2, 3], group=4)
    np.testing.assert_allclose(planes[2], [[0, 3, 1, 2]])
    np.testing.assert_allclose(planes[3], [[0.125, 3.125, 1.125, 1.875]])
    narrow = schemes.binary_planes(weights[:, :3], [2, 4], group=2)
    assert narrow[4].shape == (1, 3)


def dense_errors(monkeypatch, model, text, tmp_path, bits):
    """Squared output errors of dense matrices over a text, plain and calibrated, by matrix."""
    from pyruntime.engine import calibrate as module

    seen = {}

    class Keeping(module._Watched):
        def linear(self, x, out=None):
            seen.setdefault(id(self), [self, []])[1].append(x.copy())
            return super().linear(x, out)

    monkeypatch.setattr(module, "_Watched", Keeping)
    real, found = module._watch, {}
    monkeypatch.setattr(module, "_watch", lambda *a: found.update(real(*a)) or found)
    importance = calibrate(model, text, num_tokens=1200)
    errors_of = []
    for name, given in (("plain", None), ("calibrated", importance)):
        out = tmp_path / f"{name}-{bits}"
        quantize(model, out, layout="44", dense_bits=bits, importance=given)
        store = ExpertStore(out / "experts.mxs")
        errors_of.append({})
        for key, watched in found.items():
            matrix = store.read_dense(*key)
            if matrix is None:
                continue
            x = np.concatenate(seen[id(watched)][1]).astype(np.float64)
            off = x @ (watched.weight - matrix.dequantize()).T.astype(np.float64)
            errors_of[-1][key] = np.square(off).sum()
    return importance, *errors_of


@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_weighs_dense_matrices_too(tmp_path, monkeypatch, bits):
    text = tmp_path / "text"
    text.write_text(TEXT)
    importance, plain, calibrated = dense_errors(monkeypatch, shipped(), text, tmp_path, bits)
    assert set(plain) == {(layer, number) for layer in range(4) for number in (0, 1)}
    assert importance.of_dense(0, 0).shape == (256,) and importance.of_dense(0, HEAD) is None
    # At 8 bits there is little to weigh: what is left of the errors is chance.
    slack = 1.01 if bits == 4 else 1.05
    assert all(calibrated[key] <= slack * plain[key] for key in plain)
    assert sum(calibrated.values()) < (0.99 if bits == 4 else 1.02) * sum(plain.values())


@pytest.mark.parametrize("case", ["qwen2moe", "qwen3moe_mixed"])
def test_all_kinds_of_dense_matrices_are_measured(tmp_path, case):
    from pyruntime.engine import calibrate as module

    engine = Engine.load(DATA / case, 64, 4)
    weights, config = engine.weights, engine.config
    head = weights.head
    bench = QuantizedBench.__new__(QuantizedBench)
    bench.engine, bench.layers, bench.plans = engine, config.num_layers, 0
    bench.pool = ReferenceBlockPool(64, 4, config.num_layers)
    prompt = reference(case)["prompt"]
    bench.add(0, prompt)
    want = bench.prefill(0, return_logits=True).logits
    bench.engine.remove(0)
    bench.pool.free(0)
    found = module._watch(weights, config.tied)
    bench.add(1, prompt)
    np.testing.assert_array_equal(bench.prefill(1, return_logits=True).logits, want)
    importance = module.Importance()
    norm = np.square(weights.norm, dtype=np.float64)
    module._measured(importance, found, norm)
    report = quantize(DATA / case, tmp_path / "q", dense_bits=4, importance=importance)
    plain = quantize(DATA / case, tmp_path / "plain", dense_bits=4)
    assert report.dense.keys() == plain.dense.keys()
    store = ExpertStore(tmp_path / "q" / "experts.mxs")
    kinds = set()
    for (layer, number), watched in found.items():
        kinds.add(number)
        weighing = importance.of_dense(layer, number)
        assert weighing.shape == (watched.weight.shape[1],) and weighing.max() > 0
        assert watched.tokens == (1 if number == HEAD else len(prompt))
        errors_of = []
        for at in (store, ExpertStore(tmp_path / "plain" / "experts.mxs")):
            off = watched.weight - at.read_dense(layer, number).dequantize()
            errors_of.append((np.square(off, dtype=np.float64) * weighing).sum())
        assert errors_of[0] <= errors_of[1] * 1.001
    assert kinds == {*DENSE.values(), *(() if config.tied else (HEAD,))}
    if not config.tied:
        seen = found[0, HEAD].squares
        np.testing.assert_allclose(importance.of_dense(0, HEAD), (seen + 16 * norm) / 17, rtol=1e-6)
        assert found[0, HEAD].weight is head
