"""Fine-tune Qwen2-VL on your own images and videos: the whole training loop, on one device.

    python finetune.py --data my_data/data.json --epochs 3 --learning_rate 1e-5

Read it top to bottom. Everything that is not about learning is one call with a verb for a name; what a call does
stands in the file of util/ that it comes from.
"""

import time
from collections.abc import Iterable

from util.command_line import run_training
from util.config import Config, parse_arguments


def train(config: Config) -> str:
    """Train as `config` says and return the run directory."""
    import torch

    from util.checkpoint import Saver, compare_plan, load_checkpoint, read_state, resolve_resume
    from util.collator import Collator
    from util.cost import disk, flops, kept_sizes, memory
    from util.cost.measure import measure
    from util.data.bad_samples import Lenient, begin
    from util.data.loader import Loader
    from util.data.media import MediaReader
    from util.dataset import Examples, Samples
    from util.guard import FiniteGuard, StopSignal
    from util.log import Run
    from util.model import build_model, choose_device, choose_dtype, find_model, load_config, load_processor
    from util.optimizer import build_optimizer, clip_gradient, set_learning_rate
    from util.plan import print_plan, worker_count
    from util.publish.save_model import save_model
    from util.results import show
    from util.results.evaluate import evaluate_answers, evaluate_loss
    from util.run_folder import LATEST
    from util.steps import held_out_steps, training_steps
    from util.vision import Budget

    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    path = find_model(config.model, device)
    model_config, processor = load_config(path), load_processor(path)
    resumed = resolve_resume(config, LATEST)
    workers = worker_count(config, device)

    # ---- data: checked, measured from file headers, and all steps surveyed before any weight is loaded
    budget, reader = Budget.of(config), MediaReader(config)
    samples = Samples(Examples(config.data, processor), processor, budget, reader)
    sizes = measure(samples, config.max_tokens, config, config.num_workers, kept_sizes.folder_of(config))
    if resumed:
        compare_plan(config, resumed, sizes, samples.examples)
    steps = training_steps(sizes, samples.examples, config)

    def load(data: Samples, micro_batches: Iterable[list[int]]) -> Loader:
        """The packed batches of `micro_batches`, made in data workers."""
        data, pin = Lenient(data, config.on_bad_sample), device.type == "cuda"
        return Loader(data, batch_sampler=micro_batches, collate_fn=Collator(), num_workers=workers, pin_memory=pin)

    held_out, held_out_plan = None, None
    if config.eval_data:
        held_out = Samples(Examples(config.eval_data, processor), processor, budget, reader)
        found = measure(held_out, config.max_tokens, config, config.num_workers, kept_sizes.folder_of(config))
        held_out_plan = held_out_steps(found, config)

    # ---- the plan, before anything is loaded or written
    run = Run(config, device, resumed)
    counts = memory.count_parameters(model_config, config)
    survey = steps.survey
    needs = memory.forecast(model_config, counts, config, dtype, survey.heaviest)
    print_plan(config, run.directory, path, device, dtype, counts, needs, sizes, steps, held_out_plan, workers)
    print(show.describe_first(samples, config.on_bad_sample), flush=True)
    memory.check(model_config, config, dtype, device, survey, needs)
    disk.check(run.directory, counts, config, dtype)

    # The first batch is made while nothing is written yet: what its pixels are refused for leaves no trace.
    first = read_state(resumed)["step"] if resumed else 0
    batches = begin(load(samples, steps.micro_batches(first)))

    model = build_model(config, path, processor, device)
    optimizer = build_optimizer(model, config)
    if resumed:
        load_checkpoint(resumed, model, optimizer)
    stop = StopSignal(run)
    run.open(first, len(steps), {"model": path, "dtype": str(dtype).removeprefix("torch."), "device": str(device)})
    saver = Saver(run.directory, config, len(steps), run.say, sizes.mark())
    guard = FiniteGuard(run.say)

    def evaluate(step: int) -> float:
        loader = load(held_out, held_out_plan.micro_batches())
        totals = evaluate_loss(model, stop.watch_together(loader), device)
        scores = evaluate_answers(model, held_out, device, config, stop)
        run.log_evaluation(step, totals, scores)
        return totals["loss_sum"] / (totals["supervised_tokens"] or float("nan"))

    # ---- the loop
    for number, (epoch, step, planned) in enumerate(steps.after(first), first + 1):
        began = time.perf_counter()
        micro_batches = stop.fetch(batches, len(step))
        data_seconds = time.perf_counter() - began
        totals = {key: sum(batch.counts[key] for batch in micro_batches) for key in micro_batches[0].counts}
        if totals.pop("unread"):  # a batch of this step, on this rank or another
            saver.save_unless_there(model, optimizer, number - 1)
            raise stop.end(number - 1, saver)
        assert totals["samples"] + totals["skipped"] == planned

        # One division, by the supervised tokens of the whole global batch, which are known before the first backward:
        # how samples are spread over micro-batches then changes nothing.
        supervised_tokens = totals["supervised_tokens"] or float("nan")  # all were skipped: the guard leaves it out
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for batch in micro_batches:
            batch_loss_sum = model(batch.to(device))
            if batch_loss_sum.requires_grad:  # not of text alone where only the tower is trained
                (batch_loss_sum / supervised_tokens).backward()
            loss_sum += batch_loss_sum.detach()

        grad_norm = clip_gradient(model, config.max_grad_norm).item()
        learning_rate = set_learning_rate(optimizer, number - 1, len(steps), config)
        loss, stopping, due = loss_sum.item() / supervised_tokens, stop.requested, saver.is_due(number)
        if planned and guard.allows(number, loss, grad_norm, [name for batch in micro_batches for name in batch.where]):
            saver.wait_for_copy()
            optimizer.step()
        optimizer.zero_grad()

        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        values["data_seconds"] = round(data_seconds, 4)
        work = flops.training_flops(model_config, [sizes[i] for micro in step for i in micro], config)
        run.log_step({"step": number, "epoch": epoch, **values, **totals, **reader.statistics()}, work)

        is_last, state = number == len(steps), {"step": number}
        if held_out and not stopping and (is_last or (config.eval_every and number % config.eval_every == 0)):
            state["eval_loss"] = stop.unless_stopped(evaluate, number)
            stopping = state["eval_loss"] is None
        if due or stopping:
            saver.save(model, optimizer, state, is_last=bool(stopping) and not is_last)
        if stopping and not is_last:
            raise stop.end(number, saver)
        run.restart_clock()

    saver.wait()
    save_model(model, processor, budget, run.directory, run.say)
    stop.restore()
    run.finish(len(steps) - first, sizes.left_out, guard.left_out)
    stop.check_last_evaluation()
    return str(run.directory)


if __name__ == "__main__":
    run_training(train, parse_arguments(__doc__.splitlines()[0]))
