"""dictionary_learning itself: makes an SAE (`write-<class>`) or opens one, and says what it makes of vectors.

Arguments: see proof.ask_peer. MLSAE_PEER_DICTIONARY_LEARNING_PATH names a checkout. What its package imports to
read text and language models is not called here, and need not be installed.
"""

import json
import os
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

checkout = Path(os.environ["MLSAE_PEER_DICTIONARY_LEARNING_PATH"])
package = types.ModuleType("dictionary_learning")
package.__path__ = [str(checkout / "dictionary_learning")]
sys.modules["dictionary_learning"] = package
for name in ("zstandard", "datasets", "transformers"):
    sys.modules[name] = types.ModuleType(name)
for name in ("load_dataset", "AutoModelForCausalLM", "AutoTokenizer"):
    setattr(sys.modules["datasets" if name == "load_dataset" else "transformers"], name, None)
from dictionary_learning import utils  # noqa: E402 - after the package's place is known


def make(kind: str, d_model: int):
    """An SAE of a class with nothing at its initial value."""
    torch.manual_seed(5)
    sizes = {"AutoEncoderTopK": [8], "BatchTopKSAE": [8], "MatryoshkaBatchTopKSAE": [8, [64, 192]]}
    ae = getattr(utils, kind)(d_model, 256, *sizes.get(kind, []))
    for name, tensor in ae.named_parameters():
        if tensor.ndim == 1 and name != "threshold":
            tensor.data.normal_()
    decoder = ae.decoder.weight.data.T if hasattr(ae, "decoder") else ae.W_dec.data
    decoder *= torch.rand(256, 1) + 0.5
    if kind == "JumpReluAutoEncoder":
        ae.threshold.data = torch.rand(256) * 5
    elif kind != "AutoEncoder":
        ae.threshold.fill_(3.0)
    return ae


action, folder, given, answer = sys.argv[1:]
x = load_file(given)["x"]
with torch.no_grad():
    if action.startswith("write-"):
        kind = action.removeprefix("write-")
        trainer = {"dict_class": kind, "activation_dim": x.shape[1], "dict_size": 256, "lm_name": "gpt2"}
        trainer |= {"layer": 1, "submodule_name": "resid_post_layer_1"} | ({"k": 8} if "TopK" in kind else {})
        Path(folder).mkdir(parents=True)
        torch.save(make(kind, x.shape[1]).state_dict(), f"{folder}/ae.pt")
        Path(folder, "config.json").write_text(json.dumps({"trainer": trainer}))
    ae, _ = utils.load_dictionary(folder, "cpu")
    code = ae.encode(x)
    recon = ae.decode(code)
save_file({"code": code.contiguous(), "recon": recon.contiguous()}, answer)
version = (
    (checkout / "dictionary_learning" / "__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]
)
Path(answer).with_name("who.json").write_text(json.dumps({"who": f"dictionary_learning {version}"}))
