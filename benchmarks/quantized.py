"""Memory of base weights in 4 bits compared with bf16, for the decoder's linear layers and for all weights of a model.

    python -m benchmarks.quantized [--out FILE]

The bytes of a weight in 4 bits are measured from the tensors that bitsandbytes stores for the linear layers of one
decoder layer of the 2B model. The number of weights in linear layers and in the whole model follows from the table of
names of each model size. Embeddings, output layer, norms, tower and projector remain in bf16.
"""

import argparse
import json
from pathlib import Path

import bitsandbytes
import torch

from megavlm.adapters.nf4 import Nf4
from megavlm.convert.names import table
from megavlm.model.shapes import Shapes

CONFIGS = Path(__file__).parents[1] / "configs" / "models"


def linears(shapes: Shapes) -> list[tuple[int, ...]]:
    """The shapes of the linear layers of the decoder."""
    keys = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    entries = [entry for entry in table(shapes) if entry.key.startswith("language.decoder.")]
    return [entry.shape for entry in entries if entry.key.endswith(keys)]


def measured(double: bool) -> float:
    """The bytes of the linear layers of a decoder layer in 4 bits, divided by those in bf16."""
    layer = linears(Shapes.from_hf(CONFIGS / "2b"))[:4]
    whole = packed = 0
    for shape in layer:
        weight = torch.randn(shape, dtype=torch.bfloat16)
        whole, packed = whole + weight.nbytes, packed + Nf4(weight, double=double).nbytes
    return packed / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/quantized.json"), help="JSON file to write")
    options = parser.parse_args()
    ratios = {"nf4": measured(False), "nf4_double": measured(True)}
    models = {}
    for folder in sorted(path.parent for path in CONFIGS.glob("*/config.json")):
        shapes = Shapes.from_hf(folder)
        total = sum(torch.Size(entry.shape).numel() for entry in table(shapes))
        inside = sum(torch.Size(shape).numel() for shape in linears(shapes))
        of_all = {name: 1 - inside / total * (1 - ratio) for name, ratio in ratios.items()}
        models[folder.name] = {"weights": total, "in_4_bits": inside, "of_bf16": of_all}
        shown = " · ".join(f"{name} {ratio:.3f}" for name, ratio in of_all.items())
        print(
            f"{folder.name:10} {inside / total:6.1%} of {total / 1e9:6.2f} G weights in 4 bits · bytes / bf16: {shown}"
        )
    print("bytes of linear layers / bf16:", " · ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items()))
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    result = {"linears_of_bf16": ratios, "models": models, "versions": versions}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
