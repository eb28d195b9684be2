"""torch.compile in train.py: the whole graph, and nothing compiled after the first epoch."""
from __future__ import annotations

import re

import pytest
import torch
from training_process import Training, colours


def report_graphs(module):
    """Demand the whole graph, and print with each epoch how many graphs were compiled so far."""
    aot_eager, compile_ = torch._dynamo.lookup_backend('aot_eager'), torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def whole_graph(model, **kwargs):
        print('asked for', kwargs['backend'])
        return compile_(model, backend=backend, fullgraph=True)
    torch.compile = whole_graph

    def reporting(name):
        plain = getattr(module, name)

        def report(*args, **kwargs):
            print(name, len(graphs), flush=True)
            return plain(*args, **kwargs)
        setattr(module, name, report)
    for name in ('update_summary', 'draw_curves'):  # after each epoch, and after the test part
        reporting(name)


@pytest.mark.parametrize(('model', 'flags'), [
    ('test_resnet', ('--balance', 'gate')),
    pytest.param('test_vit', ('--balance', 'learned', '--separate-experience', '--mixup', 0.5), marks=pytest.mark.slow),
])
def test_nothing_is_compiled_after_the_first_epoch(tmp_path, model, flags):
    folder = colours(tmp_path / 'colours', 27, 13, 9)  # batches of 8 images, and of 3 (left out), 5 and 1
    status, text = Training('--model', model, '--stimuli', folder, '--dataset', folder, '--img-size', 32, '-b', 8,
                            '--epochs', 3, '--no-amp', '--device', 'cpu', *flags, '--torchcompile', 'eager',
                            '--output', tmp_path, '--experiment', 'run', prepare=report_graphs).end()
    assert status == 0, text
    assert text.count('asked for eager') == 2
    counts = [int(count) for count in re.findall(r'^(?:update_summary|draw_curves) (\d+)$', text, re.MULTILINE)]
    assert len(counts) == 8  # three epochs and the end, in both stages
    assert 0 < counts[0] == counts[3] < counts[4] == counts[7]
