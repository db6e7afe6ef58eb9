"""Does lm-evaluation-harness find the same? python bench/lm_eval_parity.py MODEL TASKS.jsonl.gz

MODEL is a checkpoint, an exported folder or a preset (random weights). `--style harness` and the
harness itself, on the exported model in float32, answer tasks from all over the file. The exit code
is 1 if more than one choice in 300 differs, or a summed log-likelihood by more than 1e-3.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import harness
import torch

from gpt2.distributed import world
from gpt2.evaluation import choices, hellaswag
from gpt2.evaluation.hellaswag import Choice, Score

BOUND = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("path", type=Path)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=1, help="of lm_eval, in endings")
    parser.add_argument("--block_size", type=int, help="a shorter context, to try what is cut off")
    arguments = parser.parse_args()
    net = harness.load_model(arguments.model, arguments.block_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = world.World(0, 1, device)
    with TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):
        path = harness.spread(arguments.path, arguments.tasks, Path(root))
        tasks = hellaswag.load(path, style="harness")
        harness.prepare(net, path, Path(root))
        theirs = harness.load(Path(root), device, arguments.batch_size)
        answers = harness.answer(Path(root), theirs)

    questions = [task.question for task in tasks]
    full = torch.autocast(device.type, enabled=False)
    losses = choices.ending_losses(net.to(device), questions, alone, full)
    assert losses is not None
    ours = [hellaswag.choose(task, row) for task, row in zip(tasks, losses, strict=True)]
    chosen = [_choice(answer) for answer in answers]
    differences = [
        abs(loss + likelihood)
        for row, answer in zip(losses, answers, strict=True)
        for loss, likelihood in zip(row, answer.sums, strict=True)
    ]
    pairs = list(zip(ours, chosen, strict=True))
    by_sum = sum(our.by_sum == their.by_sum for our, their in pairs)
    by_mean = sum(our.by_mean == their.by_mean for our, their in pairs)
    room = net.config.block_size + 1
    cut = sum(
        len(task.question.context) + max(map(len, task.question.endings)) > room for task in tasks
    )
    their_score = Score(
        sum(answer.acc for answer in answers) / len(answers),
        sum(answer.acc_norm for answer in answers) / len(answers),
        len(answers),
    )
    print(f"{len(tasks)} tasks on {device}; {cut} are longer than the model's context")
    print(f"the same ending by sum (acc):       {by_sum} of {len(tasks)}")
    print(f"the same ending by mean (acc_norm): {by_mean} of {len(tasks)}")
    print(f"log-likelihoods differ by {max(differences):.1e} at the most ({len(differences)})")
    for name, score in (("gpt2", hellaswag.score(tasks, losses)), ("lm_eval", their_score)):
        print(f"{name:<8} acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}")
    same = min(by_sum, by_mean) >= len(tasks) - len(tasks) // 300
    return 0 if same and max(differences) <= BOUND else 1


def _choice(answer: harness.Answer) -> Choice:
    """The endings that the harness counts; it tells only whether they are right."""
    by_sum = max(range(4), key=answer.sums.__getitem__)
    by_mean = max(range(4), key=lambda index: answer.sums[index] / len(answer.endings[index]))
    assert answer.acc == (by_sum == answer.label)
    assert answer.acc_norm == (by_mean == answer.label)
    return Choice(by_sum, by_mean)


if __name__ == "__main__":
    sys.exit(main())
