"""SAELens itself, run by its own Python: opens every SAE in a tree; with `write` it puts some of its own there first."""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def randomised(sae):
    """An SAE with no tensor at its initial value."""
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    return sae


def write(folder: Path, d_model: int, n_latents: int = 256, k: int = 8) -> None:
    """One of each kind that has a twin, with the keys that change what it computes."""
    import sae_lens

    torch.manual_seed(3)
    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name="blocks.2.hook_resid_post", model_name="pythia-70m", context_size=128
    )
    shape = {"d_in": d_model, "d_sae": n_latents, "metadata": metadata}
    topk = sae_lens.TopKSAEConfig(k=k, normalize_activations="layer_norm", **shape)
    randomised(sae_lens.TopKSAE(topk)).save_model(folder / "topk")
    rescaled = sae_lens.TopKSAEConfig(k=k, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False, **shape)
    randomised(sae_lens.TopKSAE(rescaled)).save_model(folder / "topk-rescaled")
    randomised(sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**shape))).save_model(folder / "jumprelu")
    standard = sae_lens.StandardSAEConfig(apply_b_dec_to_input=False, **shape)
    randomised(sae_lens.StandardSAE(standard)).save_model(folder / "standard")
    for name, config, kind in (
        ("batchtopk", sae_lens.BatchTopKTrainingSAEConfig(k=k, **shape), sae_lens.BatchTopKTrainingSAE),
        (
            "matryoshka",
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=[64, n_latents], **shape),
            sae_lens.MatryoshkaBatchTopKTrainingSAE,
        ),
    ):
        sae = randomised(kind(config))
        sae.topk_threshold.fill_(0.5)
        sae.save_inference_model(folder / name)
    checkpoint = sae_lens.TopKTrainingSAEConfig(k=k, **shape)
    randomised(sae_lens.TopKTrainingSAE(checkpoint)).save_model(folder / "topk-in-training")


def main(action: str, folder: Path, given: Path, answer: Path) -> None:
    """The dense codes and reconstructions of x by every SAE below the folder, one after the other in the order of their paths."""
    warnings.simplefilter("ignore")
    import sae_lens

    x = load_file(given)["x"]
    if action == "write":
        write(folder / "theirs", x.shape[1])
    places = sorted(path.parent for path in folder.rglob("cfg.json"))
    saes = [sae_lens.SAE.load_from_disk(place, dtype="float32") for place in places]
    saes[0].save_model(answer.parent / "again")
    with torch.no_grad():
        codes = [sae.encode(x) for sae in saes]
        recons = [sae.decode(code) for sae, code in zip(saes, codes, strict=True)]
    save_file({"code": torch.cat(codes), "recon": torch.cat(recons)}, answer)
    names = [str(place.relative_to(folder)) for place in places]
    says = {name: sae.cfg.metadata.to_dict() for name, sae in zip(names, saes, strict=True)}
    who = {"who": f"sae-lens {sae_lens.__version__}", "names": names, "metadata": says}
    (answer.parent / "who.json").write_text(json.dumps(who))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
