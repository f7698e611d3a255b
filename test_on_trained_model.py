"""After: what a tuned model answers to every question of test_data/, side by side with what the untuned one answered.

python test_on_trained_model.py                             the newest run
python test_on_trained_model.py train_output/my_run         a run, or train_output/my_run/checkpoints/step_000100
python test_on_trained_model.py --image a.jpg --question "What is this?"
"""

from util.command_line import run_command
from util.results.answer import (
    answer_one,
    chosen_metrics,
    parse_arguments,
    print_before_and_after,
    require,
    run_after,
    run_before,
    write_report,
)


def main() -> None:
    settings = parse_arguments(__doc__, trained=True)
    if settings.question:
        answer_one(settings, settings.run)
    else:
        before = run_before(settings)
        after = run_after(settings)
        choice = chosen_metrics(settings, after)
        print_before_and_after(before, after, choice, settings.show)
        write_report(settings)
        require(after, choice.metrics[0], settings.at_least)


if __name__ == "__main__":
    run_command(main)
