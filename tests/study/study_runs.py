"""Finished runs of a study as its csv keeps them, without training any."""
from timm_emoreg.study.grid import COLUMNS, read_rows, write_rows

TESTS = {'plain': (66.0, 65.0, 67.0), 'init': (68.0, 66.0, 68.5), 'regulated': (70.0, 67.0, 71.0),
         'random': (65.0, 64.5, 66.0), 'shuffled': (66.5, 65.0, 67.5), 'regulated:learned': (66.0,)}


def write_run(folder, arm, seed, test, stimuli='emoji', images='1000', predictions=None, precision='float32',
              attention='', convolution='', loader=''):
    key = f'{arm.replace(":", ".")}_{images}_s{seed}'
    rows = read_rows(folder / 'results.csv')
    row = dict.fromkeys(COLUMNS, '') | {
        'key': key, 'arm': arm, 'model': 'resnet10t', 'stimuli': '' if arm == 'plain' else stimuli,
        'target': 'cifar10', 'train_images': images, 'seed': seed, 'test': test, 'validation': test + 1,
        'seconds': 10 * seed + 5, 'epochs': 3, 'precision': precision, 'attention': attention,
        'convolution': convolution, 'loader': loader}
    write_rows(folder / 'results.csv', [*rows, row], COLUMNS)
    if predictions is not None:
        (folder / 'runs' / key / 'task').mkdir(parents=True)
        lines = [f'{target},{prediction}' for target, prediction in predictions]
        (folder / 'runs' / key / 'task/predictions.csv').write_text('\n'.join(['target,prediction', *lines]) + '\n')


def write_runs(folder):
    for arm, tests in TESTS.items():
        for seed, test in enumerate(tests):
            write_run(folder, arm, seed, test)
    return folder
