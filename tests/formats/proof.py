"""What every format's proof shares: SAEs with nothing at its initial value, vectors that probe them, and peers to ask.

The proof is equal outputs. A peer is the library's own class, asked in a process of the Python that MLSAE_PEER_<NAME> names, else
this one if it is installed; beside it stands a definition in a few lines, which is always asked.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlsae import unpickler
from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.sae import MLSAE

D_MODEL, N_LATENTS, K, LAYERS = 32, 256, 8, (0, 1, 3)
ROWS: list[dict[str, object]] = []
"""Of docs/formats.md: what was compared in this session, by format, direction, input and peer."""
REFUSALS: set[tuple[str, str, str]] = set()
"""Also of it: format, what was wrong with a file, and the sentence that refused it."""


@dataclass(frozen=True)
class Answer:
    """What somebody's SAE makes of vectors."""

    code: Tensor
    """[token, n_latents], dense."""
    recon: Tensor
    """[token, d_model]."""
    who: str
    """Package and version, or `definition`."""


def make_sae(
    frame: str = "vector", *, d_model: int = D_MODEL, layers: tuple[int, ...] = LAYERS, seed: int = 0, **changes
) -> MLSAE:
    """An MLSAE with all the biases, thresholds and maps it can have, a fitted frame, and decoder rows not of unit norm."""
    torch.manual_seed(seed)
    config = {"d_model": d_model, "n_latents": N_LATENTS, "k": K, "layers": layers, "frame": frame, **changes}
    sae = MLSAE(MLSAEConfig(**config))
    sae.b_pre.data.normal_()
    sae.W_dec.data *= torch.rand(len(sae.W_dec), 1) + 0.5
    sae.frame.fit(torch.randn(len(layers), d_model), torch.rand(len(layers)) * 9 + 0.5)
    if sae.b_enc is not None:
        sae.b_enc.data.normal_()
    if sae.threshold is not None:
        sae.threshold.uniform_(0, 2)
    if sae.lens is not None:
        sae.lens.weight.normal_(std=0.2 * d_model**-0.5)
        sae.lens.bias.normal_()
    return sae


def random_vectors(sae: MLSAE) -> Tensor:
    """[layer, token, d_model]: 50 far from the origin, zero, and one that, in a TopK SAE, fewer latents than k see.

    For the last one rows of `W_enc` change their sign until but three pre-activations of layer 0 are positive.
    """
    n_layers, d_model = len(sae.layers), sae.config.d_model
    x = torch.cat([7 * torch.randn(n_layers, 50, d_model) + 3, torch.zeros(n_layers, 1, d_model)], 1)
    last = 7 * torch.randn(n_layers, 1, d_model) + 3
    shift, scale = sae.frame.shift_and_scale(last, list(range(n_layers)))
    pre_acts = (sae.frame.apply_to(last, shift, scale)[0, 0] - sae.biases[0]) @ sae.W_enc[
        : sae.parts([0])[0].latents.stop
    ].T
    positive = (pre_acts > 0).nonzero().flatten()[3:]
    sae.W_enc.data[positive] *= -1
    return torch.cat([x, last], 1)


def real_vectors() -> Tensor | None:
    """[layer, token, d_model] of a language model's residual stream, if MLSAE_REAL_RESID names a file of some (`resid`)."""
    path = os.environ.get("MLSAE_REAL_RESID")
    return None if path is None else load_file(path)["resid"]


def ours(sae: MLSAE, x: Tensor) -> list[Answer]:
    """The answer of an MLSAE for every layer of `x [layer, token, d_model]`."""
    with torch.no_grad():
        code = sae.encode(x)
        return [Answer(dense, recon, "mlsae") for dense, recon in zip(code.to_dense(), sae.decode(code), strict=True)]


def inputs(sae: MLSAE) -> list[tuple[str, MLSAE, Tensor]]:
    """Random vectors with the SAE and, if there are real ones, those with an SAE like it of their width."""
    found = [("random", sae, random_vectors(sae))]
    if (resid := real_vectors()) is not None:
        config = sae.config.model_dump(
            exclude={"expansion_factor", "d_model", "layers", "frame"}, exclude_defaults=True
        )
        wide = make_sae(sae.config.frame, d_model=resid.shape[2], layers=(0, 1, 2), **config)
        found.append(("real", wide, resid[:3]))
    return found


def of_group(sae: MLSAE, row: int, answer: Answer) -> Answer:
    """With the latents of a layer's own group alone, as a file of one layer has them."""
    latents = sae.parts([row])[0].latents
    return Answer(answer.code[:, latents], answer.recon, answer.who)


def unpickle_here(path: Path, *, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `untrusted.unpickled` answers, without the seconds that another process takes to start."""
    assert path.stat().st_size <= max_bytes
    return unpickler.flattened(torch.load(path, weights_only=True), max_bytes)


def compare(name: str, direction: str, inputs: str, got: Answer, want: Answer, *, atol: float = 1e-5) -> None:
    """Note, and assert, how far two answers lie apart relative to the larger one's largest entry; ties are not compared."""
    least, larger = lowest(want.code), torch.maximum(got.code, want.code)
    near = (least * (1 - 1e-5) <= larger) & (larger <= least * (1 + 1e-5))
    rows = ~(near & ((got.code > 0) != (want.code > 0))).any(-1)
    assert rows.float().mean() > 0.9
    far = {
        part: float((a[rows] - b[rows]).abs().max() / b.abs().max().clamp_min(1e-30))
        for part, a, b in (("code", got.code, want.code), ("recon", got.recon, want.recon))
    }
    other = want.who if got.who == "mlsae" else got.who
    ROWS.append({"format": name, "direction": direction, "input": inputs, "peer": other, **far, "n": int(rows.sum())})
    assert max(far.values()) <= atol, (name, direction, inputs, other, far)


def lowest(code: Tensor) -> Tensor:
    """Each row's smallest positive entry, [token, 1]."""
    return torch.where(code > 0, code, torch.inf).amin(-1, keepdim=True)


def peer_python(name: str, package: str) -> str | None:
    """The Python that has a peer: the one that MLSAE_PEER_<NAME> names, else this one if it has the package."""
    given = os.environ.get(f"MLSAE_PEER_{name.upper().replace('-', '_')}")
    return given or (sys.executable if find_spec(package) is not None else None)


def ask_peer(python: str, name: str, action: str, folder: Path, x: Tensor, scratch: Path) -> Answer:
    """What tests/formats/peers/<name>.py answers: `read` opens the SAE in a folder; `write` makes one there first.

    It is called with: action, folder, a file with `x [token, d_model]`, a file to write with `code` and `recon`, whose metadata
    says `who`.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    given, answer = scratch / "x.safetensors", scratch / "answer.safetensors"
    save_file({"x": x.contiguous()}, given)
    script = Path(__file__).parent / "peers" / f"{name.replace('-', '_')}.py"
    command = [python, str(script), action, str(folder), str(given), str(answer)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(answer)
    return Answer(found["code"], found["recon"], json.loads((scratch / "who.json").read_text())["who"])


def refuse(name: str, what: str, folder: Path, **given: object) -> str:
    """Open an SAE that must be refused, and note how; gives back the sentence."""
    with pytest.raises((ModelError, ConfigError)) as refusal:
        MLSAE.from_pretrained(folder, **given)
    sentence = str(refusal.value).replace(str(folder), folder.name)
    assert "\n" not in sentence
    REFUSALS.add((name, what, sentence))
    return sentence
