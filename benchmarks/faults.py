"""Do the tests bite? Plant faults in a copy of the package, one at a time, and see that the tests turn red.

    python benchmarks/faults.py                        all of them, in a few minutes
    python benchmarks/faults.py "final norm" fsync     those with one of these words in their names
    python benchmarks/faults.py --list

A fault is a text that stands exactly once in its file, what stands in its stead, and the test that must fail for it; a
text that is no longer there is refused by name. C++ with a fault is compiled. Exits with 1 unless every fault was caught.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NEEDED = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "README.md", "hatch_build.py")
"""What the tests read, and what compiles the kernels."""
LIMIT_SECONDS = 300
"""What takes longer hangs."""


class Fault(NamedTuple):
    """A mistake that a tired programmer would make."""

    name: str
    file: str
    """Under src/mlsae."""
    old: str
    new: str
    test: str
    """Under tests; all of its cases are run until one is red."""

    def planted_in(self, source: str) -> str:
        """The file's text with the fault. Raises ValueError unless its place is found, once."""
        if (n := source.count(self.old)) != 1:
            raise ValueError(f"'{self.name}': its text stands {n} times in {self.file}; mend its entry in {__file__}")
        return source.replace(self.old, self.new)


FAULTS = [
    # ---- the right stream --------------------------------------------------------------------------------------------
    Fault(
        "the embeddings are layer 0",
        "blocks.py",
        "row.copy_(resid)",
        "row.copy_(flowing)",
        "test_lm.py::test_every_layer_equals_an_independent_hook",
    ),
    Fault(
        "a layer is read one block too late",
        "lm.py",
        "edits | {layer: keep_in(row)",
        "edits | {min(layer + 1, self.n_layers - 1): keep_in(row)",
        "test_lm.py::test_every_layer_equals_an_independent_hook",
    ),
    Fault(
        "what was seen before is forgotten",
        "lm.py",
        'more |= {} if past is None else {"past_key_values": past}',
        "more |= {}",
        "test_lm.py::test_going_on_from_what_was_seen_is_the_pass_over_all",
    ),
    Fault(
        "the last layer is read after the final norm",
        "lm.py",
        "        self._run(self.hf.base_model, tokens, edits | {layer: keep_in(row) for layer, row in zip(wanted, out)})\n",
        "        final = self._run(\n"
        "            self.hf.base_model, tokens, edits | {layer: keep_in(row) for layer, row in zip(wanted, out)}\n"
        "        )\n"
        "        if wanted[-1] == self.n_layers - 1:\n"
        "            out[-1] = final.last_hidden_state\n",
        "test_lm.py::test_every_layer_equals_an_independent_hook",
    ),
    Fault(
        "layer 0 is taken for none, so the last",
        "lm.py",
        "        check_layers((layer,), self.shape)\n",
        "        layer = layer or self.n_layers - 1\n        check_layers((layer,), self.shape)\n",
        "test_lm.py::test_resuming_from_a_layer_gives_the_logits",
    ),
    Fault(
        "the first position is not masked",
        "lm.py",
        "keep[:, :1] = False",
        "keep[:, :0] = False",
        "test_lm.py::test_keep_mask_by_hand",
    ),
    Fault(
        "the mask is not applied",
        "reading.py",
        "return Reading(tokens, resid, visible, resid[:, visible],",
        "return Reading(tokens, resid, visible, resid.flatten(1, 2),",
        "test_reading.py::test_masked_vectors_are_left_out_in_order",
    ),
    Fault(
        "an outlier is left out of its own layer only",
        "reading.py",
        "visible = keep & within.all(0)",
        "visible = keep & within.any(0)",
        "test_reading.py::test_vectors_beyond_a_limit_are_counted_per_layer_and_their_tokens_left_out",
    ),
    # ---- text and tokens ---------------------------------------------------------------------------------------------
    Fault(
        "a BOS with id 0 is no BOS",
        "tokens.py",
        "return int(first[0]) if first and first[0] ==",
        "return int(first[0]) if first and first[0] and first[0] ==",
        "test_numbers.py::test_packed_tokens_are_the_same_and_counted_alike_in_every_command",
    ),
    Fault(
        "BOS is forgotten in packing",
        "data.py",
        "return cls(context_length, tokenizer.separator_id, tokenizer.bos_id, packing, dtype)",
        "return cls(context_length, tokenizer.separator_id, None, packing, dtype)",
        "test_data.py::test_every_block_starts_with_bos_and_the_rest_is_the_stream",
    ),
    Fault(
        "a document begins at the separator before it",
        "data.py",
        "ends = np.cumsum([len(ids) + 1 for ids in documents])",
        "ends = np.cumsum([len(ids) + 1 for ids in documents]) - 1",
        "test_data.py::test_documents_start_where_it_is_said",
    ),
    Fault(
        "a document's first token counts with the one before",
        "data.py",
        'side="right") - 1',
        'side="left") - 1',
        "test_data.py::test_document_ids_change_after_separators",
    ),
    Fault(
        "every pass has the same order",
        "data.py",
        "permutation(self.n_blocks, seed, int(epoch))",
        "permutation(self.n_blocks, seed, 0)",
        "test_data.py::test_each_pass_is_a_permutation_of_its_own",
    ),
    Fault(
        "a row is read again after the network failed",
        "text.py",
        "dataset.skip(n_rows)",
        "dataset.skip(n_rows - 1)",
        "test_text.py::test_network_failures_neither_lose_nor_repeat_rows",
    ),
    # ---- the autoencoder ---------------------------------------------------------------------------------------------
    Fault(
        "top k is one short",
        "ops/reference.py",
        "values[rows], indices[rows] = top.values.relu(), _lowest_of_ties(",
        "values[rows] = top.values.where(top.values > top.values.amin(1, keepdim=True), 0.0).relu()\n"
        "        indices[rows] = _lowest_of_ties(",
        "test_ops.py::test_encode_is_the_dense_definition",
    ),
    Fault(
        "what was rectified passes a gradient",
        "ops/autograd.py",
        "(grads[0] * (values > 0)).flatten(0, 1)",
        "grads[0].flatten(0, 1)",
        "test_ops.py::test_rows_with_fewer_than_k_positive_entries",
    ),
    Fault(
        "a gradient forgets the frame's scale",
        "ops/autograd.py",
        "-2 * grad_squared[:, None, None] * scale",
        "-2 * grad_squared[:, None, None] * torch.ones_like(scale)",
        "test_losses.py::test_losses_and_gradients_are_the_equations",
    ),
    Fault(
        "the way out forgets the shift",
        "sae.py",
        "return (framed + bias) * code.scale + code.shift",
        "return (framed + bias) * code.scale",
        "test_sae.py::test_decoding_by_hand",
    ),
    Fault(
        "the way out has the scale of the way in",
        "sae.py",
        "return (framed + bias) * code.scale + code.shift",
        "return (framed + bias) * self.frame.divisor(code.scale) + code.shift",
        "test_numbers.py::test_every_command_measures_the_same[lawson2024]",
    ),
    Fault(
        "the frame divides by the variance",
        "frames.py",
        "variance.sqrt().to(self.scale)",
        "variance.to(self.scale)",
        "test_frames.py::test_layer_frame_gives_every_layer_mean_0_and_variance_1",
    ),
    Fault(
        "NaN is masked away as an outlier",
        "sae.py",
        "return ~(norms > limit.view(-1, *[1] * (norms.ndim - 1)))",
        "return norms <= limit.view(-1, *[1] * (norms.ndim - 1))",
        "test_sae.py::test_nan_is_not_hidden_by_the_limit_on_norms",
    ),
    Fault(
        "a decoder is normalised by column",
        "sae.py",
        "self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)",
        "self.W_dec /= self.W_dec.norm(dim=0, keepdim=True)",
        "test_trainer.py::test_decoder_rows_are_unit_norm_after_every_step",
    ),
    # ---- losses and the optimizer ------------------------------------------------------------------------------------
    Fault(
        "AuxK pulls on the reconstruction",
        "losses.py",
        "error = error.detach()",
        "error = error",
        "test_losses.py::test_aux_does_not_reach_the_reconstruction",
    ),
    Fault(
        "AuxK has the wrong sign",
        "trainer.py",
        "per_layer.mean() + self.config.aux_coef * aux",
        "per_layer.mean() - self.config.aux_coef * aux",
        "test_trainer.py::test_fifty_steps_are_the_equations[standard-layer-1-1-2]",
    ),
    Fault(
        "the target of the published AuxK is detached",
        "losses.py",
        "return mesh.ratio(error - guess, spread)",
        "return mesh.ratio(error.detach() - guess, spread)",
        "test_losses.py::test_losses_and_gradients_are_the_equations",
    ),
    Fault(
        "micro-batches weigh alike however many tokens they hold",
        "trainer.py",
        "self.optimizer.backward(loss * n_tokens)",
        "self.optimizer.backward(loss)",
        "test_trainer.py::test_a_step_in_parts_is_the_step",
    ),
    Fault(
        "Adam's betas are swapped",
        "optimizer.py",
        '"betas": self.config.adam_betas,',
        '"betas": self.config.adam_betas[::-1],',
        "test_impls.py::test_a_run_may_change_who_computes_it",
    ),
    Fault(
        "Adam forgets its bias correction",
        "ops/cpu.py",
        'corrections = [1 - beta ** float(moments["step"]) for beta in betas]',
        "corrections = [1.0 for _ in betas]",
        "test_ops_cpu.py::test_project_and_adam_are_torchs",
    ),
    Fault(
        "the decoder's gradient is not projected",
        "optimizer.py",
        "        if self.unit_rows:\n            self.project()\n",
        "",
        "test_trainer.py::test_fifty_steps_are_the_equations[standard-layer-1-1-2]",
    ),
    Fault(
        "W_dec is not normalised after a step",
        "optimizer.py",
        "        if self.unit_rows:\n            self.sae.normalize_decoder_()\n",
        "",
        "test_trainer.py::test_decoder_rows_are_unit_norm_after_every_step",
    ),
    Fault(
        "the kernels do not know that W_dec has unit rows",
        "optimizer.py",
        'return self.unit_rows and name == "W_dec"',
        'return self.unit_rows and name == "W_enc"',
        "test_trainer.py::test_decoder_rows_are_unit_norm_after_every_step",
    ),
    Fault(
        "warm-up begins at 0",
        "trainer.py",
        "(self.steps + 1) / warmup",
        "self.steps / warmup",
        "test_trainer.py::test_learning_rate_rises_holds_and_falls",
    ),
    Fault(
        "0 is taken for not given",
        "trainer.py",
        "return next(value for value in values if value is not None)",
        "return next((value for value in values if value), values[-1])",
        "test_trainer.py::test_0_is_a_value_and_not_a_blank",
    ),
    Fault(
        "b_pre is the mean",
        "initial.py",
        "for _ in range(max_steps):",
        "for _ in range(0):",
        "test_initial.py::test_geometric_median_is_the_oracle",
    ),
    # ---- training ----------------------------------------------------------------------------------------------------
    Fault(
        "the dead-latent clock counts micro-batches",
        "trainer.py",
        "self.quiet + (1 if forwards else n_tokens)",
        "self.quiet + 1",
        "test_trainer.py::test_a_silenced_latent_is_dead_after_its_tokens",
    ),
    Fault(
        "validation moves the dead-latent clock",
        "validation.py",
        "if trainer.rules.validation_counts:",
        "if True:",
        "test_numbers.py::test_a_latent_silenced_in_a_run_is_dead_after_its_tokens",
    ),
    Fault(
        "a step is checked for NaN after the update",
        "trainer.py",
        "            grad_norm = self.mesh.everywhere(lambda: self._finite(norms))\n"
        "        except NumericsError:\n"
        "            self.abandon()\n"
        "            raise\n"
        "        lr, limit = self._schedule(), self.config.clip_grad_norm\n"
        "        self.optimizer.step(lr, 1.0 if limit is None or grad_norm <= limit else limit / grad_norm)\n",
        "        except NumericsError:\n"
        "            self.abandon()\n"
        "            raise\n"
        "        lr, limit, grad_norm = self._schedule(), self.config.clip_grad_norm, math.hypot(*norms.values())\n"
        "        self.optimizer.step(lr, 1.0 if limit is None or grad_norm <= limit else limit / grad_norm)\n"
        "        self._finite(norms)\n",
        "test_trainer.py::test_a_non_finite_loss_changes_no_weight",
    ),
    Fault(
        "weights and moments are not checked for NaN",
        "trainer.py",
        "            self.mesh.everywhere(self._check_state)\n",
        "",
        "test_nonfinite.py::test_it_ends_in_that_step_before_the_update[second moment-1]",
    ),
    Fault(
        "a stop is not heard",
        "stopping.py",
        "        self.asked = True\n",
        "",
        "test_train.py::test_asked_to_stop_it_saves_and_resumes_as_if_nothing_happened",
    ),
    # ---- resuming ----------------------------------------------------------------------------------------------------
    Fault(
        "a moment is not restored",
        "optimizer.py",
        'value.copy_(state[f"adam.{name}.{key}"])',
        'value.copy_(state[f"adam.{name}.{key}"] if key != "exp_avg_sq" else value)',
        "test_trainer.py::test_resuming_is_never_having_stopped",
    ),
    Fault(
        "the dead-latent clock is not restored",
        "trainer.py",
        '        self.quiet = state["quiet"].to(self.quiet)\n',
        "",
        "test_trainer.py::test_resuming_is_never_having_stopped",
    ),
    Fault(
        "the place in the data is not restored",
        "train.py",
        "self.position, self.validated = progress.position, ",
        "self.position, self.validated = 0, ",
        "test_resume.py::test_stopped_after_any_step_it_ends_in_the_same_bits",
    ),
    Fault(
        "random numbers are not restored",
        "train.py",
        '        torch.set_rng_state(checkpoint.state["rng.torch"])\n',
        "",
        "test_resume.py::test_stopped_after_any_step_it_ends_in_the_same_bits",
    ),
    Fault(
        "metrics of a killed part are kept",
        "train.py",
        "            self.metrics.truncate(self.metrics_bytes)\n",
        "",
        "test_resume.py::test_a_damaged_newest_checkpoint_costs_steps_and_not_bits",
    ),
    # ---- checkpoints and files ---------------------------------------------------------------------------------------
    Fault(
        "files are not compared with the manifest",
        "checkpoint.py",
        "manifest = self._check(directory)",
        "manifest = self._check(directory, sizes_only=True)",
        "test_checkpoint.py::test_files_of_two_checkpoints_are_not_mixed",
    ),
    Fault(
        "the files of several processes are read one after the other, and not group by group",
        "manifest.py",
        """            for group in range(groups):
                for i, slices in enumerate(opened):
""",
        """            for i, slices in enumerate(opened):
                for group in range(groups):
""",
        "test_manifest.py::test_pieces_in_order_are_the_whole_and_none_is_larger_than_allowed",
    ),
    Fault(
        "an SAE of an earlier step is read",
        "formats/checkpoint.py",
        "known is not None and int(",
        "known is None and int(",
        "test_train_parallel.py::test_where_the_sae_is_of_an_earlier_step_the_newest_sound_checkpoint_is_read",
    ),
    Fault(
        "a validation is of what one process read",
        "validation.py",
        "return float(added_up(mesh, sums).quality()",
        "return float(sums.quality()",
        "test_train_parallel.py::test_fifty_steps_of_four_processes_are_those_of_one",
    ),
    Fault(
        "vectors left out are counted on one process",
        "norms.py",
        "together = torch.cat(parts).cpu()",
        "together = parts[0].cpu()",
        "test_train_parallel.py::test_fifty_steps_of_four_processes_are_those_of_one",
    ),
    Fault(
        "rotation deletes the newest",
        "checkpoint.py",
        "for old in self.steps()[:-keep]:",
        "for old in self.steps()[keep:]:",
        "test_checkpoint.py::test_the_newest_are_kept",
    ),
    Fault(
        "a checkpoint with NaN is saved",
        "checkpoint.py",
        "if (name := nonfinite({**checkpoint.sae, **checkpoint.state})) is not None:",
        "if (name := nonfinite(checkpoint.sae)) is not None:",
        "test_checkpoint.py::test_a_tensor_that_is_not_finite_is_refused_and_nothing_written",
    ),
    Fault(
        "a file is written in its place",
        "files.py",
        'staged = path.with_name(f".tmp-{path.name}-{os.getpid()}")\n        try:\n            with open(staged, "wb") as file:',
        'staged = path.with_name(f".tmp-{path.name}-{os.getpid()}")\n        try:\n            staged.touch()\n'
        '            with open(path, "wb") as file:',
        "test_checkpoint.py::test_a_write_refused_at_any_call_leaves_old_or_new",
    ),
    Fault(
        "a file is not fsynced before it is renamed",
        "files.py",
        "                os.fsync(file.fileno())\n",
        "",
        "test_files.py::test_bytes_are_durable_before_their_name_is",
    ),
    Fault(
        "the staged folder is not fsynced",
        "files.py",
        "            sync_directory(staged)\n",
        "",
        "test_files.py::test_a_staged_directory_is_synced_before_its_rename",
    ),
    Fault(
        "the name of a saved checkpoint is not fsynced",
        "files.py",
        "            os.rename(staged, target)\n            sync_directory(target.parent)\n",
        "            os.rename(staged, target)\n",
        "test_checkpoint.py::test_what_a_crash_of_the_machine_leaves_is_old_or_new",
    ),
    Fault(
        "the lock is shared",
        "files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_checkpoint.py::test_simultaneous_starts_give_one_writer",
    ),
    # ---- what we did not write ---------------------------------------------------------------------------------------
    Fault(
        "a folder's name is compared as a string",
        "files.py",
        "(path := (root / name).resolve()).is_relative_to(root.resolve())",
        "str(path := (root / name).resolve()).startswith(str(root.resolve()))",
        "test_files.py::test_names_that_lead_out_of_a_folder",
    ),
    Fault(
        "a key twice in JSON is its last",
        "untrusted.py",
        "object_pairs_hook=_unique_keys, ",
        "",
        "test_untrusted.py::test_bad_json_is_refused_with_its_place",
    ),
    Fault(
        "a private config key passes",
        "hub.py",
        'private = key.startswith("_") and item and key not in _INERT_KEYS',
        "private = False",
        "test_lm.py::test_configs_that_could_choose_code",
    ),
    Fault(
        "a tokenizer may bring its code",
        "hub.py",
        'if isinstance(found, dict) and "auto_map" in found:',
        "if False:",
        "test_hostile.py::test_a_repository_runs_no_code[auto_map of the tokenizer]",
    ),
    Fault(
        "an index may name a pickle",
        "hub.py",
        'not file.endswith(".safetensors")',
        'not file.endswith((".safetensors", ".bin"))',
        "test_hostile.py::test_a_repository_runs_no_code[index to a pickle]",
    ),
    Fault(
        "control characters reach the terminal",
        "errors.py",
        'not in "CZ"',
        'not in "Z"',
        "test_errors.py::test_what_could_act_on_a_terminal_is_escaped",
    ),
    # ---- the right numbers -------------------------------------------------------------------------------------------
    Fault(
        "FVU is about each token's mean",
        "metrics.py",
        "(resid - resid.mean(1, keepdim=True))",
        "(resid - resid.mean(2, keepdim=True))",
        "test_metrics.py::test_fvu_by_hand",
    ),
    Fault(
        "variance of two batches forgets how far their means are apart",
        "metrics.py",
        " + delta.square().sum(1) * self.n_tokens * n_tokens / total",
        "",
        "test_metrics.py::test_results_do_not_depend_on_the_batch_size",
    ),
    Fault(
        "merged metrics forget a field",
        "metrics.py",
        "        self.batch_sums += other.batch_sums\n",
        "",
        "test_metrics.py::test_merging_is_adding",
    ),
    Fault(
        "cross-entropy is of the token itself",
        "metrics.py",
        "-log_probs[:-1].gather(1, tokens[1:, None])",
        "-log_probs[1:].gather(1, tokens[1:, None])",
        "test_metrics.py::test_cross_entropy_by_hand",
    ),
    Fault(
        "KL is swapped",
        "evaluate.py",
        "index_add_(0, owner, kl_divergence(before, after)",
        "index_add_(0, owner, kl_divergence(after, before)",
        "test_evaluate.py::test_delta_ce_and_kl_by_hand",
    ),
    Fault(
        "masked positions are spliced too",
        "evaluate.py",
        "resid[visible] = sae.decode(sae.encode(resid[visible][None], layers=[layer]))[0]",
        "resid[:] = sae.decode(sae.encode(resid[None], layers=[layer]))[0]",
        "test_evaluate.py::test_a_splice_leaves_masked_positions_alone",
    ),
    Fault(
        "an SAE is judged by the text it was trained on",
        "heldout.py",
        'return "test" if trained_on(sae, data) or "test" in',
        'return "test" if "test" in',
        "test_heldout.py::test_held_out_text_is_the_default",
    ),
    Fault(
        "two terms of the decomposition are swapped",
        "analysis/depth.py",
        "Decomposition(within.item(), token.item(), latent.item(), total.item())",
        "Decomposition(token.item(), within.item(), latent.item(), total.item())",
        "analysis/test_layers.py::test_planted_latents_read_as_planted",
    ),
    Fault(
        "the distribution over layers is weighted by count",
        "analysis/depth.py",
        "probability = totals / mass",
        "probability = counts / counts.sum(dim=0)",
        "analysis/test_layers.py::test_a_distribution_worked_by_hand",
    ),
    Fault(
        "centre of mass numbers layers from 1",
        "analysis/depth.py",
        "centre = (layer * probability).sum(dim=0)",
        "centre = ((layer + 1) * probability).sum(dim=0)",
        "analysis/test_layers.py::test_a_distribution_worked_by_hand",
    ),
    Fault(
        "a latent dies at its first layer",
        "analysis/depth.py",
        "len(active) - 1 - active.flip(0).int().argmax(dim=0)",
        "active.int().argmax(dim=0)",
        "analysis/test_layers.py::test_births_and_deaths_are_those_planted",
    ),
    Fault(
        "an inactive latent is an event",
        "analysis/events.py",
        "entry = np.flatnonzero(value > 0)",
        "entry = np.flatnonzero(value >= 0)",
        "analysis/test_layers.py::test_selected_but_inactive_latents_are_never_counted",
    ),
    Fault(
        "one event goes on at the next token",
        "analysis/events.py",
        "begins[of_token[of_token < len(entry)]] = True",
        "begins[of_token[:1]] = True",
        "analysis/test_layers.py::test_equals_brute_force",
    ),
    Fault(
        "an event persists into the next event",
        "analysis/events.py",
        "goes_on[self.last] = False",
        "goes_on[-1] = False",
        "analysis/test_layers.py::test_what_is_kept_of_events_equals_brute_force",
    ),
    Fault(
        "all documents are one shard",
        "analysis/layers.py",
        "total.index_add_(0, shards, sums[name])",
        "total.index_add_(0, shards * 0, sums[name])",
        "analysis/test_layers.py::test_shards_add_up_to_the_whole",
    ),
    Fault(
        "the jackknife does not take out the bias",
        "intervals.py",
        "centre = n * value - (n - 1) * mean",
        "centre = value + 0 * mean",
        "test_intervals.py::test_it_takes_the_bias_out_of_a_square",
    ),
    Fault(
        "the independent null moves all layers alike",
        "analysis/nulls.py",
        "[torch.randperm(n_tokens, generator=generator) for _ in range(n_layers)]",
        "[torch.randperm(n_tokens, generator=generator)] * n_layers",
        "analysis/test_nulls.py::test_independence_keeps_every_rate_and_makes_coincidence_chance",
    ),
    Fault(
        "an evaluation's interval forgets which document a token is of",
        "evaluate.py",
        "reading, documents = read(lm, sae, batch.tokens), shard_of(batch.documents)",
        "reading, documents = read(lm, sae, batch.tokens), shard_of(batch.tokens)",
        "test_evaluate.py::test_intervals_are_of_documents_left_out",
    ),
    Fault(
        "the centred cosine is not centred",
        "analysis/geometry.py",
        "centred, raw = _adjacent_cosines(resid, mean), ",
        "centred, raw = _adjacent_cosines(resid, torch.zeros_like(mean)), ",
        "analysis/test_geometry.py::test_the_centred_cosine_ignores_an_offset_and_the_raw_one_does_not",
    ),
    # ---- the sums of depth in C++ ------------------------------------------------------------------------------------
    Fault(
        "C++: a token inherits the events of the one before",
        "ops/cpu.cpp",
        "        event_of[j] = -1;\n",
        "",
        "analysis/test_layers.py::test_equals_brute_force[cpu-0]",
    ),
    Fault(
        "C++: a run goes on over a layer that is left out",
        "ops/cpu.cpp",
        "i + 1 < size && layer[i + 1] == layer[i] + 1;",
        "i + 1 < size;",
        "analysis/test_layers.py::test_event_shapes_by_hand[cpu]",
    ),
    Fault(
        "C++: the spread of an event is weighted by its mass twice",
        "ops/cpu.cpp",
        "spread[n] += variance,",
        "spread[n] += mass * variance,",
        "analysis/test_layers.py::test_scaling_an_event_changes_mass_but_neither_event_nor_count[cpu]",
    ),
    Fault(
        "C++: the layers of events are all of the first shard",
        "ops/cpu.cpp",
        "by_layer = shard[t] * n_layers, q = sequence[t];",
        "by_layer = 0, q = sequence[t];",
        "analysis/test_layers.py::test_without_a_shard_is_the_statistics_of_the_other_documents[cpu]",
    ),
    Fault(
        "C++: the mean layers of events are all of the first sequence",
        "ops/cpu.cpp",
        "firsts[q * n + j] += mean;",
        "firsts[j] += mean;",
        "analysis/test_layers.py::test_published_ratios_equal_brute_force_averaged_over_sequences[cpu-0]",
    ),
    Fault(
        "the explorer answers a crowd before all others",
        "explorer/app.py",
        "            await asyncio.sleep(0)\n            if self._worker.is_full:",
        "            if self._worker.is_full:",
        "explorer/test_load.py::test_who_comes_after_a_crowd_is_answered_before_it",
    ),
    Fault(
        "the explorer computes co-active latents however many wait",
        "explorer/app.py",
        "(coactive|logits)",
        "(logits)",
        "explorer/test_load.py::test_exactly_what_the_worker_computes_is_refused_at_the_door",
    ),
    Fault(
        "the explorer's pages do not escape",
        "explorer/app.py",
        "autoescape=True",
        "autoescape=False",
        "explorer/test_app.py::test_no_text_in_any_place_of_a_page_becomes_markup[LM name]",
    ),
    Fault(
        "a text ends the data block of the explorer's pages",
        "explorer/app.py",
        r'.replace("<", "\\u003c")',
        "",
        "explorer/test_app.py::test_no_text_in_any_place_of_a_page_becomes_markup[token]",
    ),
    Fault(
        "the explorer forgets which place of a sign-in form is text",
        "explorer/exchange.py",
        "to=html.escape(place)",
        "to=place",
        "explorer/test_app.py::test_no_text_in_any_place_of_a_page_becomes_markup[URL]",
    ),
]


# ---- running them ------------------------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """A copy of the package, its kernels and its tests, without compiled Python: a fault may be as long as what it replaces."""
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    found = python(folder, "-c", "import mlsae; print(mlsae.__file__)").stdout.strip()
    assert Path(found).is_relative_to(folder), f"{found} is tested and not the copy"
    return folder


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy: its package comes first, and it leaves no compiled files behind."""
    ours = {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and output."""
    pytest = python(
        copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *(f"tests/{t}" for t in tests)
    )
    return pytest.returncode, pytest.stdout


COMPILE = """
import sys, types
from pathlib import Path

sys.modules["hatchling.builders.hooks.plugin.interface"] = types.SimpleNamespace(BuildHookInterface=object)
import hatch_build

sys.exit(len(hatch_build.build(Path())) < int(sys.argv[1]))
"""
"""What an installation compiles, without an installation: it would be of the copy, and shared by all."""


def compiled(copy: Path, n_levels: int) -> None:
    """Compile the copy's kernels anew. Raises RuntimeError if fewer instruction sets than these have one."""
    done = python(copy, "-c", COMPILE, str(n_levels))
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile:\n{done.stdout[-4000:]}")


@contextlib.contextmanager
def planted(fault: Fault, copy: Path) -> Iterator[None]:
    """The fault in the copy, while open; in C++, also in the libraries."""
    file = copy / "src" / "mlsae" / fault.file
    sound = {file: file.read_bytes()}
    if file.suffix == ".cpp":
        sound |= {library: library.read_bytes() for library in file.parent.glob("*.lib")}
    file.write_text(fault.planted_in(file.read_text()))
    try:
        if file.suffix == ".cpp":
            compiled(copy, len(sound) - 1)
        yield
    finally:
        for path, content in sound.items():
            path.write_bytes(content)


def caught_by(fault: Fault, copy: Path) -> str | None:
    """The test that turns red; None if none does. Tests that cannot be run (exit status 2 to 5), or do not end, are not red."""
    with planted(fault, copy), contextlib.suppress(subprocess.TimeoutExpired):
        status, output = run_tests(copy, [fault.test])
        red = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
        return red[1] if status == 1 and red else None
    return None


def main() -> int:
    """Exit status: 0 if every fault was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults with one of these words in their names")
    parser.add_argument("--list", action="store_true", help="print the faults and the tests that catch them")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.words or any(word in fault.name for word in options.words)]
    if options.list:
        print("\n".join(f"{fault.name}  ({fault.file}; {fault.test})" for fault in faults))
        return 0
    try:
        for fault in faults:
            fault.planted_in((ROOT / "src" / "mlsae" / fault.file).read_text())
    except ValueError as error:
        parser.error(str(error))
    if not faults:
        parser.error(f"no fault has one of {options.words} in its name; see --list")
    with tempfile.TemporaryDirectory(prefix="mlsae-faults-") as folder:
        copy = copied(Path(folder))
        status, output = run_tests(copy, list(dict.fromkeys(fault.test for fault in faults)))
        if status:
            print(f"The tests are not green without a fault:\n{output[-4000:]}")
            return 1
        n_caught = 0
        for fault in faults:
            started = time.monotonic()
            test = caught_by(fault, copy)
            n_caught += test is not None
            seconds = f"{time.monotonic() - started:5.1f} s"
            print(f"{'caught' if test else 'NOT CAUGHT':<10} {seconds}  {fault.name}: {test or fault.test}", flush=True)
    print(f"{n_caught} of {len(faults)} caught")
    return 0 if n_caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
