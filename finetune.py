"""Fine-tune Qwen2-VL on your own images and videos: the whole training loop, on one device.

    python finetune.py --data my_data/data.json --epochs 3 --learning_rate 1e-5

Read it top to bottom. Everything that is not about learning is one call with a verb for a name; what a call does
stands in the file of util/ that it comes from.
"""

import math
import time

from util.command_line import run_training
from util.config import Config, parse_arguments


def train(config: Config) -> str:
    """Train as `config` says and return the run directory."""
    # Imported here, and not at the top, so that --help and a wrong flag answer before torch is loaded.
    import torch

    from util.checkpoint import Saver, compare_plan, load_checkpoint, read_state, resolve_resume
    from util.collator import Batch, Collator, total_counts
    from util.cost import disk, fastest, flops, memory
    from util.cost.budget import fit_memory
    from util.cost.measure import measure_all
    from util.data.loader import packed_batches
    from util.data.media import MediaReader
    from util.dataset import Examples, Samples
    from util.frozen import keep_features
    from util.guard import FiniteGuard, StopSignal
    from util.log import Run
    from util.model import build_model, choose_device, choose_dtype, find_model, load_config, load_processor
    from util.optimizer import build_optimizer, clip_gradient, set_learning_rate
    from util.passes import Passes
    from util.plan import print_plan
    from util.publish.final_model import FinalModel
    from util.results.evaluate import evaluate_answers, evaluate_loss
    from util.run_folder import LATEST
    from util.steps import Steps, held_out_steps, training_steps
    from util.vision import Budget

    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    resumed = resolve_resume(config, LATEST)
    path = find_model(config.model, device)
    model_config = load_config(path, config)
    processor = load_processor(path, config)
    collate = Collator(model_config.model_type)

    # ---- data: checked, measured from file headers, and all steps surveyed before any weight is loaded
    # So a bad sample, or too little memory, stops the run within seconds and not after an hour of training.
    budget = Budget.of(config, model_config.model_type)
    reader = MediaReader(config)
    examples = Examples(config.data, processor, config.train_on)
    samples = Samples(examples, processor, budget, reader)
    sizes = measure_all(samples, config)
    if resumed:
        compare_plan(config, resumed, sizes, examples)
    steps = training_steps(sizes, examples, config)
    counts = memory.count_parameters(model_config, config)
    config, steps, needs = fit_memory(config, steps, model_config, counts, dtype, device, resumed)

    held_out = None
    evaluation = None
    if config.eval_data:
        held_out = Samples(Examples(config.eval_data, processor, config.train_on), processor, budget, reader)
        held_out_sizes = measure_all(held_out, config)
        evaluation = held_out_steps(held_out_sizes, config)

    # ---- the plan, before anything is loaded or written
    run = Run(config, device, resumed)
    fastest.choose_kernels(config, model_config, device, dtype, sizes, steps)
    print_plan(config, run, path, dtype, counts, needs, samples, sizes, steps, held_out, evaluation, model_config)
    memory.check(model_config, config, dtype, device, steps.survey, needs)
    disk.check(run.directory, counts, config, dtype)

    # ---- the run: the first batch, the model, the files
    # The first batch is made before anything is written: if its pixels cannot be decoded, no run directory is left.
    first = read_state(resumed)["step"] if resumed else 0
    batches = packed_batches(samples, steps.micro_batches(first), collate, config, device).begin()

    model = build_model(config, path, processor, device)
    optimizer = build_optimizer(model, config, steps.survey.most)
    if resumed:
        load_checkpoint(resumed, model, optimizer)
    keep_features(model, reader, config)  # of a frozen tower, with --cache_dir
    stop = StopSignal(run)
    run.open(first, len(steps), path, dtype)
    final = FinalModel(run, config, resumed, model, processor, budget, len(steps))
    saver = Saver(run.directory, config, len(steps), run.say, sizes.mark(), final.evaluations)
    guard = FiniteGuard(run.say)

    def evaluate(step: int, held_out: Samples, evaluation: Steps) -> float:
        """The mean loss on held-out data; it is logged, with the scores of answers if any are asked for."""
        held_out_batches = packed_batches(held_out, evaluation.micro_batches(), collate, config, device)
        totals = evaluate_loss(model, stop.watch_together(held_out_batches), device)
        scores = evaluate_answers(model, held_out, device, config, stop)
        return run.log_evaluation(step, totals, scores)

    def run_pass(batch: Batch, supervised_weight: float) -> torch.Tensor:
        """Forward and backward of a micro-batch: adds to the gradients, and returns the sum of its losses."""
        batch_loss_sum = model(batch.to(device))  # PackedLoss.forward, in util/loss.py
        if batch_loss_sum.requires_grad:  # a text-only batch has no gradient where only the vision tower is trained
            (batch_loss_sum / supervised_weight).backward()
        return batch_loss_sum.detach()  # else it would keep the graphs of all micro-batches

    # ---- the loop
    passes = Passes(run_pass, model, optimizer, device, steps, stop, saver)
    if held_out and final.lacks_evaluation(first):  # a signal broke it off, after the step that is gone on from
        loss_there = stop.unless_stopped(evaluate, first, held_out, evaluation)
        final.note(first, loss_there, is_last=first == len(steps))
        if loss_there is None and first < len(steps):
            stop.end(first, saver)  # broken off once more, or its data cannot be read
    step = first
    for planned in final.until_settled(steps.after(first)):  # --stop_after may end them early
        step = planned.number
        # Batches are made ahead, in data workers: time spent waiting here is time the device was idle.
        began = time.perf_counter()
        micro_batches = stop.fetch(batches, len(planned.micro_batches))
        data_seconds = time.perf_counter() - began
        totals = total_counts(micro_batches)
        stop.end_if_unread(totals, step, saver, model, optimizer)
        planned.check(totals)

        # One division, by the supervised tokens of the whole global batch (each counted by its weight, mostly 1), which
        # are known before the first backward: how samples are spread over micro-batches then changes nothing.
        supervised_weight = totals["supervised_weight"] or math.nan  # of none: NaN, and the guard skips the update
        # run_pass on each of them; where memory runs out, on all of them again, as smaller ones.
        loss_sum = passes.run(step, micro_batches, supervised_weight)

        # The norm and the loss are read once all passes are queued: each read waits for the device.
        grad_norm = clip_gradient(model, optimizer, config.max_grad_norm).item()
        learning_rate = set_learning_rate(optimizer, step - 1, len(steps), config)  # the schedule counts from 0
        loss = loss_sum.item() / supervised_weight
        stopping = stop.requested  # asked once, so that all that follows goes by the same answer
        due = saver.is_due(step)
        if guard.allows(planned, loss, grad_norm, micro_batches):
            saver.wait_for_copy()  # a save under way still copies the weights that are about to change
            optimizer.step()
        optimizer.zero_grad()  # frees the gradients, also those of a step that was left out

        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        values["data_seconds"] = round(data_seconds, 4)
        work = flops.work_by_part(model_config, sizes.trained(planned.own_samples), config)
        work = flops.without_kept(work, model_config, micro_batches, config)
        run.log_step(planned, {**values, **totals, **reader.statistics()}, work)

        is_last = step == len(steps)
        evaluates = is_last or (config.eval_every and step % config.eval_every == 0)
        state = {"step": step}  # of the checkpoint, if one is due
        if held_out and evaluates and not stopping:
            # A signal breaks the evaluation off (None), so that the run is saved before a scheduler kills it.
            state["eval_loss"] = stop.unless_stopped(evaluate, step, held_out, evaluation)
            stopping = state["eval_loss"] is None
            final.note(step, state["eval_loss"], is_last)  # the best model so far is kept
        ends_early = bool(stopping) and not is_last
        if due or stopping or (final.is_settled and saver.saves):
            saver.save(model, optimizer, state, is_last=ends_early)
        if ends_early:
            stop.end(step, saver)  # raises Ended: the run is saved, and says how to go on
        run.restart_clock()  # evaluating and saving are no part of the next step's time

    saver.wait()
    model_in_words = final.write(step)
    stop.restore()
    run.finish(step - first, sizes.left_out, guard.left_out, model_in_words)
    stop.check_last_evaluation()
    return str(run.directory)


if __name__ == "__main__":
    run_training(train, parse_arguments(__doc__.splitlines()[0]))
