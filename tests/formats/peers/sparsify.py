"""sparsify itself: makes an SAE (`write`) or opens one, and says what it makes of vectors. Arguments: see proof.ask_peer."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.pop(0)  # this file's own folder, where it is what `sparsify` would mean
from sparsify import SparseCoder, SparseCoderConfig

action, folder, given, answer = sys.argv[1:]
x = load_file(given)["x"]
with torch.no_grad():
    if action == "write":
        torch.manual_seed(5)
        sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=256, k=8))
        for parameter in (sae.encoder.bias, sae.b_dec):
            parameter.data.normal_()
        sae.W_dec.data *= torch.rand(256, 1) + 0.5
        sae.save_to_disk(folder)
    sae = SparseCoder.load_from_disk(folder)
    top = sae.encode(x)
    recon = sae.decode(top.top_acts, top.top_indices)
    code = torch.zeros(len(x), sae.num_latents).scatter_(1, top.top_indices, top.top_acts)
save_file({"code": code, "recon": recon.contiguous()}, answer)
Path(answer).with_name("who.json").write_text(json.dumps({"who": f"eai-sparsify {version('eai-sparsify')}"}))
