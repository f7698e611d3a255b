"""Before: what the untuned model answers to every question of test_data/, with scores. Or one question of your own.

python test_on_official_model.py
python test_on_official_model.py --image a.jpg --question "What is this?"
"""

from util.command_line import run_command
from util.results.answer import answer_one, chosen_metrics, parse_arguments, print_answers, run_before


def main() -> None:
    settings = parse_arguments(__doc__, trained=False)
    if settings.question:
        answer_one(settings, settings.base)
    else:
        before = run_before(settings)
        print_answers({"before": before}, chosen_metrics(settings, before), settings.show)


if __name__ == "__main__":
    run_command(main)
