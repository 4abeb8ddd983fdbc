"""The table, and the cause that it names, on networks that were really trained into each fault."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from bnguard.layers.bn_layer import find_layers
from tests.whatif import trained

REFERENCE = trained.training_images()
IMAGES = trained.evaluation_images()


def diagnosed(model, *, images=IMAGES, reference=REFERENCE, score=True, batch_size=32, **options):
    return bnguard.diagnose(
        model,
        images.split(128),
        None if reference is None else reference.split(batch_size),
        trained.accuracy(images) if score else None,
        **options,
    )


def scores(diagnosis, *names):
    return [diagnosis.row(name).score for name in names]


def test_a_healthy_network_has_no_fault():
    diagnosis = diagnosed(trained.healthy())
    assert diagnosis.cause.name == "none"
    assert not diagnosis.cause.is_fault
    assert diagnosis.layers == ()
    assert [row.name for row in diagnosis.rows] == [
        "stored",
        "reference",
        "averaged",
        "evaluation",
        "batches",
        "batches of 2",
        "batches of 8",
        "batches of 32",
        "shuffled batches",
    ]
    assert (diagnosis.samples, diagnosis.reference_samples) == (597, 1024)
    assert min(scores(diagnosis, "stored", "reference", "evaluation")) > 0.9
    # Small batches are noisy for every network.
    assert diagnosis.row("batches of 2").change > 3 * diagnosis.row("batches of 32").change


@pytest.mark.parametrize("reference", [None, REFERENCE], ids=["alone", "with training data"])
def test_a_healthy_network_has_no_fault_without_a_score(reference):
    diagnosis = diagnosed(trained.healthy(), reference=reference, score=False)
    assert diagnosis.cause.name == "none"
    assert diagnosis.row("stored").score is None
    assert (diagnosis.row("reference") is None) == (reference is None)
    assert any("without reference data" in note for note in diagnosis.notes) == (reference is None)


@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
@pytest.mark.parametrize("reference", [None, REFERENCE], ids=["alone", "with training data"])
def test_too_few_updates_are_unconverged_statistics(score, reference):
    diagnosis = diagnosed(trained.unconverged(), score=score, reference=reference)
    assert diagnosis.cause.name == "unconverged-statistics"
    assert diagnosis.cause.is_fault
    assert diagnosis.cause.next_step == "bnguard.recalibrate(model, train_loader)"
    assert any("initial statistics left 69%" in line for line in diagnosis.cause.evidence)
    assert sum(layer.share for layer in diagnosis.layers) == pytest.approx(1.0)


@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
def test_it_takes_at_most_seven_forwards_of_its_data(score):
    model, sizes = trained.unconverged(), []
    with model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))):
        diagnosis = diagnosed(model, score=score)
    assert sum(sizes) <= 7 * (diagnosis.samples + diagnosis.reference_samples)


def run_on_other_batches(model, batches):
    for batch in torch.cat(batches).split(100):
        model(batch)


def run_in_other_modes(model, batches):
    for batch in batches:
        model.train()
        model(batch)
        model.eval()


def run_in_half_precision(model, batches):
    with torch.autocast("cpu", torch.bfloat16):
        run(model, batches)


def run_a_copy(model, batches):
    twin = copy.deepcopy(model)
    twin[-1].weight.data.zero_()
    run(twin, batches)


def run_and_write_to_outputs(model, batches):
    for batch in batches:
        with torch.inference_mode():
            model(batch).softmax(1).zero_()
            model(batch).zero_()


def run_after_a_failure(model, batches):
    def fail(*_):
        raise ValueError

    with model[-1].register_forward_pre_hook(fail), contextlib.suppress(ValueError):
        model(batches[0])
    run(model, [-batches[0], *batches])


def run(model, batches):
    for batch in batches:
        model(batch)


@pytest.mark.parametrize(
    ("run_batches", "is_shared"),
    [
        (run, True),
        (run_and_write_to_outputs, True),
        (run_after_a_failure, True),
        (run_on_other_batches, False),
        (run_in_other_modes, False),
        (run_in_half_precision, False),
        (run_a_copy, False),
    ],
)
def test_forwards_of_the_score_count_as_ours_if_they_are_the_same(run_batches, is_shared):
    model, batches = trained.healthy(), IMAGES.split(128)
    scoring, own = [], []

    def score(scored):
        scoring.append(True)
        run_batches(scored, batches)
        scoring.clear()
        return 0.0

    def count(*_):
        if not scoring:
            own.append(True)

    def figures(row):
        return row.change, row.flipped_share, row.gap, row.drift or 0.0, row.input_drift or 0.0

    with model.register_forward_pre_hook(count):
        expected, all_forwards = bnguard.diagnose(model, batches), len(own)
        found = bnguard.diagnose(model, batches, score=score)
    # Five batches for each row but that of shuffled batches.
    assert 2 * all_forwards - len(own) == (5 * 6 if is_shared else 0)
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert figures(row) == pytest.approx(figures(other), rel=1e-4, abs=1e-6)


def test_averaged_weights_are_stale_statistics():
    diagnosis = diagnosed(trained.averaged())
    assert diagnosis.cause.name == "stale-statistics"
    stored, reference, evaluation = scores(diagnosis, "stored", "reference", "evaluation")
    assert stored < reference - 0.03
    assert abs(reference - evaluation) < 0.02
    # The fix that it names is one.
    model = copy.deepcopy(trained.averaged())
    assert diagnosis.cause.next_step == "bnguard.recalibrate(model, train_loader)"
    bnguard.recalibrate(model, REFERENCE[:1024].split(32))
    assert trained.accuracy(IMAGES)(model) == reference


def test_averaged_weights_are_stale_statistics_without_a_score():
    assert diagnosed(trained.averaged(), score=False).cause.name == "stale-statistics"


@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
def test_other_preprocessing_is_a_data_shift_at_the_first_layer(score):
    diagnosis = diagnosed(trained.healthy(), images=IMAGES * 2.0 - 1.0, score=score)
    assert diagnosis.cause.name == "data-shift"
    assert 'method="adapt"' in diagnosis.cause.next_step
    assert diagnosis.layers[0].name == "1"
    assert diagnosis.layers[0].share > 0.5
    assert "drift at the first BN layer" in diagnosis.cause.evidence[-1]
    assert diagnosis.row("reference").drift_std > 1.0
    assert diagnosis.row("evaluation").drift_std < 1e-3


PREPARED_OTHERWISE = {
    "scaled": lambda images: images * 0.1,
    "offset": lambda images: images + 0.7,
    "not divided by 255": lambda images: images * 255.0,
    "in -1 to 1": lambda images: images * 2.0 - 1.0,
}
prepared_otherwise = pytest.mark.parametrize(
    "prepare", PREPARED_OTHERWISE.values(), ids=PREPARED_OTHERWISE
)


@prepared_otherwise
@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
def test_both_loaders_prepared_otherwise_are_not_stale_statistics(prepare, score):
    diagnosis = diagnosed(
        trained.healthy(), images=prepare(IMAGES), reference=prepare(REFERENCE), score=score
    )
    assert diagnosis.cause.name == "other-preprocessing"
    assert diagnosis.cause.cured_by is None
    assert "recalibrate(" not in diagnosis.cause.next_step
    exec(
        diagnosis.cause.next_step,
        {"loader": prepare(IMAGES).split(128), "train_loader": prepare(REFERENCE).split(32)},
    )
    drift = diagnosis.row("stored").input_drift
    shown = f"{drift:.2f}" if drift < 100 else f"{drift:.2g}"
    assert any(f"{shown} as they are (limit 0.5)" in line for line in diagnosis.cause.evidence)
    (row,) = [line for line in str(diagnosis).splitlines() if line.startswith("as they are")]
    assert row.split()[-1] == shown


@prepared_otherwise
def test_a_reference_prepared_otherwise_is_said_where_it_does_no_harm(prepare):
    diagnosis = diagnosed(trained.healthy(), reference=prepare(REFERENCE))
    assert (diagnosis.cause.name, diagnosis.cause.is_fault) == ("harmless", False)
    assert "and fit its statistics" in diagnosis.cause.message
    assert "no fault found" not in str(diagnosis)


@prepared_otherwise
def test_without_training_data_preprocessing_is_the_first_suspicion(prepare):
    diagnosis = diagnosed(trained.healthy(), images=prepare(IMAGES), reference=None)
    assert diagnosis.cause.name == "unfit-statistics"
    assert "preprocessing" in diagnosis.cause.message


def coloured(images):
    colour = torch.tensor([1.0, 0.6, 0.25]).view(1, 3, 1, 1)
    return images * colour + torch.tensor([0.0, 0.15, 0.4]).view(1, 3, 1, 1)


def normalised(images):
    mean = torch.tensor([0.3, 0.33, 0.48]).view(1, 3, 1, 1)
    return (images - mean) / torch.tensor([0.37, 0.22, 0.1]).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    "prepare",
    [lambda images: normalised(coloured(images).flip(1)), coloured],
    ids=["other order of the channels", "normalisation missing"],
)
def test_colours_prepared_otherwise_are_told_in_either_loader_and_in_both(prepare):
    def right(images):
        return normalised(coloured(images))

    torch.manual_seed(0)
    model = trained.conv_net()
    model[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    trained.fitted(model, prepare=right)

    def cause(images, reference):
        return diagnosed(model, images=images, reference=reference, score=False).cause.name

    assert cause(right(IMAGES), right(REFERENCE)) == "none"
    assert cause(prepare(IMAGES), prepare(REFERENCE)) == "other-preprocessing"
    assert cause(prepare(IMAGES), right(REFERENCE)) == "data-shift"
    assert cause(right(IMAGES), prepare(REFERENCE)) == "harmless"


def test_what_does_no_harm_is_said_and_not_called_no_fault():
    model = copy.deepcopy(trained.healthy())
    # The last layer is turned off, so that what it gets does not matter.
    model[7].weight.data.zero_()
    model[7].running_mean.zero_()
    model[7].running_var.fill_(1.0)
    model[7].num_batches_tracked.zero_()
    diagnosis = diagnosed(model)
    assert (diagnosis.cause.name, diagnosis.cause.is_fault) == ("harmless", False)
    assert "initial statistics left 100% (limit 5%)" in diagnosis.cause.evidence
    assert "no fault found" not in str(diagnosis)
    assert diagnosis.cause.next_step == "bnguard.recalibrate(model, train_loader)"


def test_the_row_of_training_batches_is_what_update_bn_gives():
    model = copy.deepcopy(trained.unconverged())
    averaged = diagnosed(model).row("averaged")
    torch.optim.swa_utils.update_bn(REFERENCE[:1024].split(32), model)
    assert averaged.score == pytest.approx(trained.accuracy(IMAGES)(model), abs=0.002)


def test_statistics_that_fit_are_not_initial_whatever_their_counter_says():
    model = copy.deepcopy(trained.healthy())
    torch.optim.swa_utils.update_bn(REFERENCE[:320].split(32), model)
    assert model[1].num_batches_tracked < 20
    assert diagnosed(model).cause.name == "none"


def test_without_training_data_a_shift_is_not_told_from_stale_statistics():
    diagnosis = diagnosed(trained.healthy(), images=IMAGES * 2.0 - 1.0, reference=None)
    assert diagnosis.cause.name == "unfit-statistics"
    assert "reference=train_loader" in diagnosis.cause.next_step


def broken(model, *names, shift_std=3.0):
    model = copy.deepcopy(model)
    for layer in find_layers(model):
        if layer.name in names:
            layer.module.running_mean -= shift_std * layer.module.running_var.sqrt()
    return model


def test_a_later_layer_alone_is_stale_and_not_shifted_without_training_data():
    diagnosis = diagnosed(broken(trained.healthy(), "4"), reference=None)
    assert diagnosis.cause.name == "stale-statistics"
    assert diagnosis.layers[0].name == "4"


@pytest.mark.parametrize("name", ["3.bn", "17.bn", "32.bn"])
def test_one_bad_layer_of_many_is_found_in_a_few_forwards(name):
    good, bad = trained.deep(), broken(trained.deep(), name, shift_std=30.0)
    (_, expected), (diagnosis, forwards) = counted(good), counted(bad)
    assert len(find_layers(bad)) == 32
    assert diagnosis.cause.is_fault
    assert diagnosis.layers[0].name == name
    assert diagnosis.layers[0].share > 0.8
    # Five to halve 32 layers to one, from either side, two that these are held against, and some
    # for layers that training left a little off; a forward a layer would be 32.
    assert forwards - expected <= 20


def counted(model):
    """Return a diagnosis of one batch, and how many forwards it took."""
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    with model.register_forward_hook(count):
        return bnguard.diagnose(model, [IMAGES[:256]], batch_sizes=()), forwards


def test_two_bad_layers_share_the_blame():
    model = broken(trained.deep(), "5.bn", "25.bn", shift_std=30.0)
    layers = bnguard.diagnose(model, [IMAGES[:256]], batch_sizes=()).layers
    assert {layer.name for layer in layers[:2]} == {"5.bn", "25.bn"}
    assert min(layer.share for layer in layers[:2]) > 0.2


def test_small_training_batches_are_named():
    diagnosis = diagnosed(trained.of_small_batches(), batch_size=3)
    assert diagnosis.cause.name == "small-batch-noise"
    assert "batches of 3" in diagnosis.cause.message
    stored, reference = scores(diagnosis, "stored", "reference")
    assert reference > stored + 0.02


@pytest.mark.parametrize("group", [1, 128], ids=["mixed evaluation", "grouped evaluation"])
@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
def test_batches_that_have_something_in_common_are_named(group, score):
    diagnosis = diagnosed(
        trained.of_scanners(),
        images=trained.scanned(IMAGES, group),
        reference=trained.scanned(REFERENCE, 32),
        score=score,
    )
    assert diagnosis.cause.name == "correlated-batches"
    assert "shuffle=True" in diagnosis.cause.next_step
    if score and group == 128:
        (as_they_come,) = scores(diagnosis, "batches")
        assert as_they_come > 0.9
        assert max(scores(diagnosis, "stored", "reference", "evaluation")) < 0.8


@pytest.mark.parametrize(
    ("group", "reference"),
    [(128, REFERENCE), (32, REFERENCE), (32, None), (8, None)],
    ids=["whole batches", "parts of batches", "parts, alone", "small parts, alone"],
)
def test_several_streams_are_not_the_noise_of_small_batches(group, reference):
    diagnosis = diagnosed(
        trained.of_two_streams(),
        images=trained.in_turn(IMAGES, group),
        reference=None if reference is None else trained.in_turn(reference, 32),
    )
    assert diagnosis.cause.name == "correlated-batches"
    assert "streams" in diagnosis.cause.message
    assert "into one batch" in diagnosis.cause.advice


@pytest.mark.parametrize("score", [True, False], ids=["score", "no score"])
@pytest.mark.parametrize("reference", [None, REFERENCE], ids=["alone", "with training data"])
def test_dropout_before_bn_is_not_another_preprocessing(score, reference):
    diagnosis = diagnosed(trained.with_dropout(), score=score, reference=reference)
    assert diagnosis.cause.name == "dropout-before-bn"
    assert diagnosis.cause.message.startswith("Dropout comes before BN layers")
    assert "with dropout active" in diagnosis.cause.evidence[1]
    model = copy.deepcopy(trained.with_dropout())
    before = trained.accuracy(IMAGES)(model)
    bnguard.recalibrate(model, REFERENCE.split(32))
    assert trained.accuracy(IMAGES)(model) > before + 0.02


def test_dropout_that_a_forward_calls_as_a_function_is_named():
    class Thins(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    layers = [Thins() if isinstance(m, nn.Dropout) else m for m in trained.with_dropout()]
    cause = diagnosed(nn.Sequential(*layers).eval()).cause
    assert cause.name == "dropout-before-bn"
    assert cause.message.startswith("dropout comes before BN layers")


def test_dropout_behind_the_last_bn_layer_is_not_named():
    model = copy.deepcopy(trained.averaged())
    model.insert(len(model) - 1, nn.Dropout(0.5))
    assert diagnosed(model.eval()).cause.name == "stale-statistics"


@pytest.mark.parametrize("steps", [3, 20])
def test_a_dry_run_in_train_mode_is_named_as_what_may_have_updated_statistics(steps):
    torch.manual_seed(0)
    model = copy.deepcopy(trained.healthy()).train()
    for _ in range(steps):
        model(torch.randn(32, 1, 8, 8))
    diagnosis = diagnosed(model.eval())
    assert diagnosis.cause.is_fault
    assert "other data updated the statistics" in diagnosis.cause.message


def test_a_sorted_training_loader_is_no_fault_of_a_healthy_network():
    labels = trained.digits()[1][trained.TRAIN]
    diagnosis = diagnosed(trained.healthy(), reference=REFERENCE[labels.argsort()])
    assert diagnosis.cause.name == "none"


def test_sorted_evaluation_batches_are_said():
    labels = trained.digits()[1][trained.EVALUATE]
    images = IMAGES[labels.argsort()]
    diagnosis = bnguard.diagnose(trained.healthy(), images.split(16), REFERENCE.split(32))
    assert diagnosis.cause.name == "none"
    assert any("evaluation batches differ" in note for note in diagnosis.notes)


def test_poisoned_statistics_are_named_with_their_layers():
    model = copy.deepcopy(trained.healthy())
    model[4].running_mean[0] = torch.nan
    model[7].running_var[1] = -1.0
    diagnosis = diagnosed(model)
    assert diagnosis.cause.name == "poisoned-statistics"
    assert "4 and 1 more" in diagnosis.cause.evidence[0]
    assert diagnosis.row("stored").change == float("inf")
    assert diagnosis.row("reference").score > 0.9
    assert [layer.name for layer in diagnosis.layers] == ["4", "7"]
    assert diagnosis.layers[0].share is None
    assert "not finite" in str(diagnosis)


def test_a_score_below_what_is_expected_is_the_fault_of_the_weights():
    model = copy.deepcopy(trained.healthy())
    nn.init.normal_(model[-1].weight)
    assert diagnosed(model).cause.name == "none"
    diagnosis = diagnosed(model, expected_score=0.95)
    assert diagnosis.cause.name == "weights"
    assert diagnosis.layers == ()


def test_an_expected_score_may_depend_on_the_scoring():
    scores = []

    def score(model):
        scores.append(1.0)
        return scores[-1]

    images, reference = IMAGES.split(16), REFERENCE.split(32)
    model, expected = trained.healthy(), lambda: 1.0 + scores[-1]
    diagnosis = bnguard.diagnose(model, images, reference, score, expected_score=expected)
    assert diagnosis.cause.name == "weights"


def test_scores_that_are_losses_are_judged_alike():
    images, labels = IMAGES, trained.digits()[1][trained.EVALUATE]

    def minus_loss(model):
        with torch.no_grad():
            return -nn.functional.cross_entropy(model.eval()(images), labels)

    for model, name in (
        (trained.healthy(), "none"),
        (trained.unconverged(), "unconverged-statistics"),
    ):
        found = bnguard.diagnose(model, images.split(128), REFERENCE.split(32), minus_loss)
        assert found.cause.name == name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lr", [0.02, 0.05])
def test_no_healthy_network_is_accused(seed, lr):
    torch.manual_seed(seed)
    model = trained.fitted(trained.conv_net(), lr=lr, epochs=3)
    for score in (True, False):
        assert diagnosed(model, score=score).cause.name == "none"
