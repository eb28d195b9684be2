"""Stands for train.py in tests of the study: takes its flags, leaves its files, and learns nothing.

FAKE_FAIL: experiments that end with status 1 before their result, FAKE_LATE: after it. FAKE_WAIT: one that waits for
SIGTERM in its first attempt. FAKE_PIPE: a named pipe by which that one says that it waits.
"""
import argparse
import json
import os
import random
import signal
import sys
import zlib
from pathlib import Path

GAIN = {'plain+': 1.2, 'init': 1.5, 'regulated': 2.5, 'random': -1.0, 'shuffled': 0.3, 'content': 0.8,
        'unlabelled': 1.0}


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument('--resume', type=Path)
    parser.add_argument('--output', type=Path)
    for name in ('model', 'task', 'dataset', 'stimuli', 'experiment', 'experience', 'device'):
        parser.add_argument(f'--{name}')
    for name in ('seed', 'epochs', 'train-images'):
        parser.add_argument(f'--{name}', type=int)
    return parser.parse_known_args(argv)[0]


def main():
    args = parse_args()
    folder = args.resume or args.output / args.experiment
    if args.resume:
        print('resumed')
        args = argparse.Namespace(**json.loads((folder / 'args.json').read_text()))
    else:
        folder.mkdir()
        kept = {name: value for name, value in vars(args).items() if name not in ('output', 'resume')}
        (folder / 'args.json').write_text(json.dumps(kept | {'commit': 'abc'}))
    if args.experience not in (None, 'none') and not Path(args.experience, 'affect', 'model_best.pth.tar').is_file():
        sys.exit(f'{args.experience}: holds no stage 1')
    if args.experiment in os.environ.get('FAKE_FAIL', '').split():
        print('the loss is nan')
        sys.exit(1)
    if args.experiment == os.environ.get('FAKE_WAIT') and not (folder / 'started').exists():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (folder / 'started').touch()
        Path(os.environ['FAKE_PIPE']).write_text('it waits')
        signal.pause()

    out = folder / args.task
    out.mkdir()
    arm = next((name for name in GAIN if f'_{name}_' in args.experiment), 'plain')
    setting = f'{args.model} {args.dataset} {args.train_images}'
    base = 60 + zlib.crc32(setting.encode()) % 10 + random.Random(f'{setting} {args.seed}').gauss(0, 1)
    rng = random.Random(f'{args.experiment}')
    chance = base + GAIN.get(arm, 0) + rng.gauss(0, 0.6)
    images, top1 = 1000, 0.0
    difficulty = random.Random(setting)
    rows = []
    for image in range(images):
        target = image % 10
        right = difficulty.random() * 0.9 + rng.random() * 0.1 < chance / 100
        rows.append(f'{target},{target if right else (target + 1) % 10}')
        top1 += 100 * right / images
    metric = 'ccc' if args.task == 'affect' else 'top1'
    (out / 'predictions.csv').write_text('\n'.join(['target,prediction', *rows]) + '\n')
    summary = [f'epoch,eval_{metric}']
    summary += [f'{epoch},{top1 * (1 - 0.7 * 0.8 ** (epoch + 1)) + rng.gauss(0, 0.4):.3f}'
                for epoch in range(args.epochs) if epoch % 2 or epoch + 1 == args.epochs]
    (out / 'summary.csv').write_text('\n'.join(summary) + '\n')
    for name in ('last', 'model_best'):
        (out / f'{name}.pth.tar').touch()
    # stage 1 is judged at its end alone; as on a machine under load, one arm is computed otherwise
    best = args.epochs if args.task == 'affect' else max(args.epochs - 1, 1)
    precision = 'bfloat16' if arm == 'regulated' else 'float32'
    (out / 'result.json').write_text(json.dumps({
        'task': args.task, 'model': args.model, 'train_images': args.train_images or 1278, 'seed': args.seed,
        'epochs': args.epochs, 'best_epoch': best, 'metric': metric, 'validation': top1 + 1,
        'test': {metric: top1},
        'balance': 0.5 if args.task == 'emoreg' else None, 'experience': args.experience, 'precision': precision,
        'attention': 'plain', 'convolution': 'columns', 'loader': 'resident', 'seconds': 2.0 * args.epochs,
        'device': f'CPU, {os.environ["OMP_NUM_THREADS"]} threads'}))
    if args.experiment in os.environ.get('FAKE_LATE', '').split():
        sys.exit(1)


if __name__ == '__main__':
    main()
