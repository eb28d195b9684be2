"""What the tests of the hub build and publish: names, settings of train.py, a record that is changed."""
from __future__ import annotations

from dataclasses import replace

from train_module import load_train

from timm_emoreg.zoo import read_records, write_records

NAME = 'emoreg_resnet18.emoji'
STAGE_2 = 'emoreg_resnet18.emoji_ft_emoji'
COMMIT = 'a' * 40


def settings(*command):
    return vars(load_train().parse_args(list(command)))


def alter(home, **changes):
    path = home / 'timm_emoreg' / 'assets' / 'weights.json'
    records = read_records(path)
    write_records({**records, NAME: replace(records[NAME], **changes)}, path)
