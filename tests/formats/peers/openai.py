"""openai/sparse_autoencoder itself: makes an SAE (`write`) or opens one, and says what it makes of vectors.

Arguments: see proof.ask_peer; for the folder, a file. MLSAE_PEER_OPENAI_PATH names a checkout, of which only model.py is used.
"""

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

source = Path(os.environ["MLSAE_PEER_OPENAI_PATH"]) / "sparse_autoencoder" / "model.py"
spec = importlib.util.spec_from_file_location("model", source)
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
warnings.simplefilter("ignore")

action, path, given, answer = sys.argv[1:]
x = load_file(given)["x"]
with torch.no_grad():
    if action == "write":
        torch.manual_seed(5)
        sae = model.Autoencoder(256, x.shape[1], activation=model.TopK(8), normalize=True)
        for parameter in (sae.pre_bias, sae.latent_bias):
            parameter.data.normal_()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), path)
    state = torch.load(path, weights_only=True)
    for name in ("activation.k", "activation.postact_fn"):  # it writes them, and does not read what it wrote
        state.pop(name, None)
    sae = model.Autoencoder.from_state_dict(state, strict=True)
    code, info = sae.encode(x)
    recon = sae.decode(code, info)
save_file({"code": code, "recon": recon.contiguous()}, answer)
Path(answer).with_name("who.json").write_text(json.dumps({"who": "openai/sparse_autoencoder"}))
