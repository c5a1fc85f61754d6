"""Models that others publish: the official 270M shape from a hub, files of both generations, and what is refused.

The official weights are out of reach here; random weights of their shape, the norms' too, show a missing `1 + w`, two
swapped RoPE bases or a window that is off by one just as well.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("transformers", reason="transformers, the oracle, is not installed (the extra `dev`)")

from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from gemlet.checkpoint import load_model, save_model
from gemlet.config import ModelConfig, preset
from gemlet.errors import GemletError
from gemlet.testing import tiny_corpus, tiny_model, tiny_tokenizer
from tests.loopback_hub import LoopbackHub
from tests.test_checkpoint import ABSURD
from tests.test_tokenizer import byte_fallback

OFFICIAL = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 262144,
}
"""The keys of google/gemma-3-270m as transformers 4.55 wrote them: of one generation only, tied without saying so."""

IDS = torch.randint(0, 262_144, (1, 560), generator=torch.Generator().manual_seed(0))  # beyond the window of 512
KEPT = 8  # positions whose logits are compared


def write_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> None:
    """A folder with random weights of a configuration, by the reference library, and a tokenizer of Gemma's kind."""
    with torch.device("meta"):  # transformers, the oracle, names the tensors and their shapes
        shapes = {name: p.shape for name, p in Gemma3ForCausalLM(Gemma3TextConfig(**config)).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        bound = 0.5 if len(shape) == 1 else (3 / shape[-1]) ** 0.5
        weights[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    byte_fallback().save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **tokens}))
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": "hybrid", "eos_token_id": 1}))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """google/gemma-3-270m at random weights, half a gigabyte."""
    home = tmp_path_factory.mktemp("official")
    write_folder(home / "model", OFFICIAL, torch.bfloat16)
    yield home / "model"
    shutil.rmtree(home)


OURS = """
import re, sys, torch
import gemlet.lm, gemlet.model  # libraries are not counted
def peak():  # of this program; ru_maxrss would count that of the process which started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
lm = gemlet.load("google/gemma-3-270m", dtype=sys.argv[1])
weights = sum(p.numel() * p.itemsize for p in lm.model.parameters())
print(sum(p.numel() for p in lm.model.parameters()), (peak() - before) / weights, lm.config.eos_token_id)
if sys.argv[2]:
    with torch.no_grad():
        ids = torch.load(sys.argv[2], weights_only=True)
        torch.save(lm.model.head(lm.model.model(ids)[:, -8:]), sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_the_official_shape_from_a_hub(official: Path, tmp_path: Path):
    """268,098,176 parameters, transformers' logits beyond the window, and the memory of the weights."""
    torch.save(IDS, tmp_path / "tensors")
    with LoopbackHub() as hub:
        hub.add("model", "google/gemma-3-270m", {path.name: path for path in official.iterdir()})
        for dtype, file in (("fp32", tmp_path / "tensors"), ("bf16", "")):
            done = subprocess.run(
                [sys.executable, "-c", OURS, dtype, str(file)],
                env={**os.environ, **hub.environment(official.parent / "home"), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            parameters, ratio, eos = done.stdout.split()
            assert (int(parameters), int(eos)) == (268_098_176, 1)
            assert 0.9 < float(ratio) < 1.3, f"loading in {dtype} took {ratio} times the memory of the weights"
        assert hub.downloads("model.safetensors") == 1
    ours = torch.load(tmp_path / "tensors", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(IDS, logits_to_keep=KEPT).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# --- config.json

OLDER = {
    key: OFFICIAL[key]
    for key in OFFICIAL
    if key not in ("_sliding_window_pattern", "layer_types", "use_bidirectional_attention")
} | {"sliding_window_pattern": 6, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "vocab_size": 262_144}
"""The keys of google/gemma-3-1b-it, as transformers 4.50 wrote them."""


def test_the_official_configurations_are_those_of_the_presets():
    ids = {"bos_token_id": 2, "pad_token_id": 0}
    assert ModelConfig.from_hf(OFFICIAL) == preset("gemma3-270m").model.replace(**ids, eos_token_id=1)
    one_billion = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    found = ModelConfig.from_hf({**OLDER, **one_billion})
    assert found == preset("gemma3-1b").model.replace(**ids, eos_token_id=(1, 106))
    assert found.stop_ids == {1, 106} and found.num_parameters == 999_885_952


@pytest.mark.parametrize("older", [OFFICIAL, OLDER])
def test_what_transformers_makes_of_a_file_means_the_same(older: dict[str, Any]):
    rewritten = json.loads(Gemma3TextConfig(**older).to_json_string(use_diff=False))
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert ModelConfig.from_hf(rewritten) == ModelConfig.from_hf(older)


SMALL = {
    "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "4.55": {**OFFICIAL, **SMALL, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "4.50": {**OLDER, **SMALL, "sliding_window_pattern": 3, "rope_theta": 5000.0, "rope_local_base_freq": 100},
    "untied": {**OFFICIAL, **SMALL, "layer_types": None, "tie_word_embeddings": False, "query_pre_attn_scalar": 24.0},
    "sparse": {"model_type": "gemma3_text", **SMALL},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_means_what_transformers_takes_it_for(tmp_path: Path, form: str, dtype: torch.dtype):
    config = FORMS[form]
    written = config | ({"query_pre_attn_scalar": 24} if form == "untied" else {})
    write_folder(tmp_path / "model", written, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))  # 24.0, which transformers 4 wrote and read
    ids = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "model")(ids), theirs(ids).logits, atol=1e-4, rtol=0)


LONG = "x" * 10_000
INEXACT: dict[str, tuple[dict[str, Any], str]] = {
    "images": ({"model_type": "gemma3"}, "model_type is 'gemma3', but gemlet computes 'gemma3_text' only: Gemma 3 for"),
    "gemma 2": ({"model_type": "gemma2"}, "model_type is 'gemma2', but gemlet .* such as google/gemma-3-270m"),
    "llama": ({"model_type": "llama"}, "model_type is 'llama', but"),
    "no type": ({"model_type": None}, "model_type is None"),
    "a list for a type": ({"model_type": ["gemma3_text"]}, "model_type is"),
    "a long type": ({"model_type": LONG}, "model_type is"),
    "linear scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling is .* plain RoPE only"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": LONG}}, "rope_scaling is"),
    "scaled parameters": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
        r"rope_parameters\['full_attention'\] is .* plain RoPE only",
    ),
    "a factor beside the default": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6, "factor": 8.0}}},
        r"rope_parameters\['full_attention'\] is",
    ),
    "half of the parameters": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"rope_parameters\['sliding_attention'\] is None",
    ),
    "two bases": (
        {"rope_parameters": {kind: {"rope_theta": 7.0} for kind in ("full_attention", "sliding_attention")}},
        "rope_theta is 1000000.0 but rope_parameters says 7.0",
    ),
    "a base in words": ({"rope_theta": "1e6"}, "rope_theta is '1e6', but must be a number"),
    "a list of bases": ({"rope_local_base_freq": [1e4]}, "rope_local_base_freq is"),
    "an endless base": ({"rope_theta": 10**400}, "rope_theta is 1000"),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, but .* only None"),
    "capped attention": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "another activation": ({"hidden_activation": LONG}, "hidden_activation is .* only 'gelu_pytorch_tanh'"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "both directions": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is"),
    "code": ({"auto_map": {"AutoModel": LONG}}, "auto_map is"),
    "no pattern": ({"layer_types": None, "sliding_window_pattern": -1}, "sliding_window_pattern is -1"),
    "half a pattern": ({"layer_types": None, "sliding_window_pattern": 2.0}, "sliding_window_pattern is 2.0"),
    "a pattern nobody reads": ({"layer_types": None, "_sliding_window_pattern": 3}, "_sliding_window_pattern is 3"),
    "no window": ({"sliding_window": None}, "sliding_window is None"),
    "wrong layers": ({"layer_types": [LONG] * 1000}, "layer_types is"),
    "wrong ids": ({"eos_token_id": list(range(10**6, 10**6 + 1000))}, "eos_token_id is 1000000, but vocab_size is"),
    "ids in words": ({"eos_token_id": ["<eos>"] * 100}, "eos_token_id is"),
    "layers in words": ({"num_hidden_layers": "18", "layer_types": None}, "num_hidden_layers is '18'"),
    "a scale of a half": ({"query_pre_attn_scalar": 16.5}, "query_pre_attn_scalar is 16.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", INEXACT)
def test_what_cannot_be_computed_exactly_is_refused_by_name_in_one_line(case: str):
    changes, message = INEXACT[case]
    with pytest.raises(GemletError, match=message) as error:
        ModelConfig.from_hf({**OFFICIAL, **changes})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


LIMITED = """
import json, resource, sys, time
from pathlib import Path
from gemlet.checkpoint import load_model
from gemlet.errors import GemletError
folder, now = Path(sys.argv[1]), int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
config, longest = json.loads((folder / "config.json").read_text()), 0
for changes in json.load(sys.stdin):
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    began = time.process_time()
    try:
        load_model(folder)
        print("loaded", changes)
    except GemletError as error:
        if len(str(error)) > 300 + len(str(folder)) or chr(10) in str(error):
            print("too long", error)
    longest = max(longest, time.process_time() - began)
print("longest", longest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_absurd_configurations_cost_neither_memory_nor_time(tmp_path: Path):
    """In a process that may not have another GB, each in less than five seconds of computing."""
    save_model(tmp_path / "model", tiny_model(3), tiny_tokenizer())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "model")],
        input=json.dumps(ABSURD),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(ABSURD) >= 25
    word, seconds = done.stdout.split()
    assert word == "longest" and float(seconds) < 5


# --- the hub

VERBS = """
import sys
from gemlet.cli import main
codes = [main([*verb.split(), "--model", "someone/tiny", *sys.argv[2:]]) for verb in sys.argv[1].split(",")]
sys.exit(max(codes))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub with one model of several files, as transformers cuts it."""
    write_folder(tmp_path / "model", FORMS["4.55"], torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    with LoopbackHub() as hub:
        hub.add("model", "someone/tiny", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
        yield hub


def call(code: str, hub: LoopbackHub, home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment(home, **env)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_verbs_take_the_name_of_a_model_on_the_hub(hub: LoopbackHub, tmp_path: Path):
    (tmp_path / "held-out.txt").write_text(tiny_corpus()[0])
    tell = ("generate --prompt A --max-new-tokens 5 --seed 1", f"eval --data {tmp_path / 'held-out.txt'}")
    done = call(VERBS, hub, tmp_path / "home", ",".join(tell))
    assert done.returncode == 0, done.stderr
    assert "nats per token" in done.stdout
    shards = {r for r in hub.requests if r.startswith("GET ") and r.endswith(".safetensors")}
    assert len(shards) > 2 and all(hub.downloads(r.split("/")[-1]) == 1 for r in shards)
    before = len(hub.requests)
    again = call(VERBS, hub, tmp_path / "home", tell[0], HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout[: len(again.stdout)] and len(hub.requests) == before


def test_a_hub_that_has_no_such_model_is_told_in_one_line(hub: LoopbackHub, tmp_path: Path):
    files = dict(hub.files("someone/tiny"))
    hub.add("model", "someone/locked", files, gated=True)
    hub.add("model", "someone/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    hub.add("model", "someone/llama", {**files, "config.json": b'{"model_type": "llama"}'})
    hub.add("model", "someone/half", {n: c for n, c in files.items() if not n.startswith("model-00002")})
    probe = """
import sys, gemlet
from gemlet.errors import GemletError
for name in sys.argv[1].split(","):
    try:
        gemlet.load(name)
    except GemletError as error:
        print(error)
"""
    answers = {
        "someone/nothing": "does not exist, or is private: check the name (OWNER/NAME)",
        "someone/locked": "(config.json) is gated: accept its terms",
        "someone/pickled": "pytorch_model.bin of the hub's model someone/pickled is a pickle",
        "someone/llama": "model_type is 'llama'",
        "someone/half": "is not a whole model: no model-00002",
    }
    said = call(probe, hub, tmp_path / "home", ",".join(answers)).stdout.splitlines()
    assert len(said) == len(answers)
    for line, words in zip(said, answers.values(), strict=True):
        assert words in line and len(line) < 300 + len(str(tmp_path)) + 100  # the cache's own paths are long
    assert hub.downloads("pytorch_model.bin") == 0 and not any("llama/resolve/main/model" in r for r in hub.requests)
