"""Every way out of Python gives the same outputs; the largest difference is printed (pytest -s)."""
import numpy as np
import pytest
import torch
from small_models import create, images, stir
from timm.models import create_model, get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

CONFIGURATIONS = {
    'resnet, learned': {'balance': 'learned'},
    'resnet, gate, separate': {'balance': 'gate', 'experience': 'separate'},
    'vit, 0.3, no modulation': {'backbone': 'test_vit', 'balance': 0.3, 'modulation': False},
    'vit, gate, ratings': {'backbone': 'test_vit', 'balance': 'gate', 'affect_kind': 'ratings', 'num_affect': 2},
}
every = pytest.mark.parametrize('name', CONFIGURATIONS)


def build(name, **kwargs):
    return stir(create(**CONFIGURATIONS[name], **kwargs)).eval()


def compare(way, name, got, want, tolerance=1e-5):
    difference = (torch.as_tensor(np.asarray(got.detach() if torch.is_tensor(got) else got)) - want).abs().max().item()
    print(f'{way}, {name}: largest difference {difference:.2g}')
    assert difference <= tolerance


@every
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_torchscript(name, tmp_path):
    model, x = build(name, scriptable=True), images()
    torch.jit.script(model).save(tmp_path / 'model.pt')
    compare('TorchScript', name, torch.jit.load(tmp_path / 'model.pt')(x), model(x).detach())


@every
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_fx(name):
    # torch.fx finds timm's leaf functions in the module of the traced forward only, which a wrapped backbone's is not;
    # the one that a ViT of free image size needs would have to be named in autowrap_modules
    model, x = build(name, **({'dynamic_img_size': False} if 'vit' in name else {})), images()
    tracer = {'leaf_modules': list(get_notrace_modules()), 'autowrap_functions': list(get_notrace_functions())}
    nodes = get_graph_node_names(model, tracer_kwargs=tracer)[1]
    traced = create_feature_extractor(
        model, eval_return_nodes=[nodes[-1]], train_return_nodes=[nodes[-1]], tracer_kwargs=tracer)
    compare('torch.fx', name, traced(x)[nodes[-1]], model(x).detach(), 0)
    scripted = torch.jit.script(traced)
    compare('torch.fx, scripted', name, scripted(x)[nodes[-1]], model(x).detach())


@every
@pytest.mark.parametrize('training', [False, True])
def test_compile_takes_the_whole_graph(name, training):
    torch._dynamo.reset()
    model, x = build(name).train(training), images()
    model.set_training_output('responses')
    want = model(x)
    got = torch.compile(model, fullgraph=True, backend='aot_eager')(x)
    for g, w in zip(got if training else (got,), want if training else (want,), strict=True):
        compare('torch.compile (aot_eager)', name, g, w.detach())


@pytest.mark.slow
@every
def test_compile_with_inductor(name):
    torch._dynamo.reset()
    model, x = build(name), images()
    compare('torch.compile (inductor)', name, torch.compile(model, fullgraph=True)(x), model(x).detach())


@every
def test_torch_export(name):
    model, x = build(name), images(3)
    batch = {0: torch.export.Dim('batch', min=2, max=64)}
    program = torch.export.export(model, (images(2),), dynamic_shapes=(batch,))
    compare('torch.export', name, program.module()(x), model(x).detach())


@every
@pytest.mark.filterwarnings('ignore')
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx')
    pytest.importorskip('onnxscript', reason='the extra onnx')
    model, x = build(name), images()
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    compare('ONNX', name, got, model(x).detach())


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_trace_of_the_features():
    model = create_model('emoreg', backbone='test_resnet', features_only=True).eval()
    traced = torch.jit.trace(model, images())
    for got, want in zip(traced(images()), model(images()), strict=True):
        compare('TorchScript trace of features', 'resnet', got, want.detach(), 0)
