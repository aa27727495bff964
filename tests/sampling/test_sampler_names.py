"""Names of samplers from other tools: each is the class and the settings that it stands for, or refused by name."""

from __future__ import annotations

import copy
import importlib.util

import pytest
from click.testing import _NamedTextIOWrapper
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.sampling import output
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.sampling.output import write_pictures
from coeffdiff.sampling.sampler_names import MISSING, SAMPLERS, SPACINGS, Found, find_sampler
from coeffdiff.sampling.schedulers import schedulers, set_scheduler
from coeffdiff.utils.png import read_recipe

KARRAS, TRAILING = {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}


@pytest.fixture
def pipe(micro_pipeline):
    micro_pipeline.unet.eval()
    return micro_pipeline


@pytest.mark.parametrize(
    ("names", "scheduler", "settings"),
    [
        (
            ("DPM++ 2M", "dpmpp_2m", "dpmsolver++", "dpm++ 2m"),
            "DPMSolverMultistep",
            {"algorithm_type": "dpmsolver++"},
        ),
        (("DPM++ 2M Karras", "dpmpp_2m karras", "dpmpp_2m_karras"), "DPMSolverMultistep", KARRAS),
        (("DPM++ 2M SDE", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), "DPMSolverMultistep", SDE),
        (("DPM++ 2M SDE Karras", "dpmpp_2m_sde_gpu_karras"), "DPMSolverMultistep", SDE | KARRAS),
        (("DPM++ 2M SDE Exponential",), "DPMSolverMultistep", SDE | {"use_exponential_sigmas": True}),
        (("DPM++ 2M SDE Heun Karras",), "DPMSolverMultistep", SDE | KARRAS | {"solver_type": "heun"}),
        (
            ("DPM++ 3M SDE Karras", "dpmpp_3m_sde karras"),
            "DPMSolverMultistep",
            SDE | KARRAS | {"solver_order": 3},
        ),
        (("dpmsingle",), "DPMSolverSinglestep", {"algorithm_type": "dpmsolver++"}),
        (("Euler", "euler", "k_euler"), "EulerDiscrete", {"use_karras_sigmas": False}),
        (("Euler Karras",), "EulerDiscrete", KARRAS),
        (("euler_sgm_uniform", "Euler SGM Uniform", "euler simple"), "EulerDiscrete", TRAILING),
        (("Euler a", "euler_a", "k_euler_a", "euler_ancestral"), "EulerAncestralDiscrete", {}),
        (("Heun",), "HeunDiscrete", {}),
        (("LMS", "k_lms"), "LMSDiscrete", {"use_karras_sigmas": False}),
        (("LMS Karras",), "LMSDiscrete", KARRAS),
        (("DPM2", "dpm_2", "k_dpm_2"), "KDPM2Discrete", {"use_karras_sigmas": False}),
        (("DPM2 Karras",), "KDPM2Discrete", KARRAS),
        (("DPM2 a", "dpm_2_a", "k_dpm_2_a", "dpm_2_ancestral"), "KDPM2AncestralDiscrete", {}),
        (("DDIM", "ddim"), "DDIM", {"clip_sample": False}),
        (("UniPC", "uni_pc"), "UniPCMultistep", {}),
        (("uni_pc_bh2",), "UniPCMultistep", {"solver_type": "bh2"}),
        (("LCM",), "LCM", {}),
        (("PLMS", "PNDM", "pndm"), "PNDM", {"skip_prk_steps": True}),
    ],
)
def test_a_name_is_its_class_and_settings_on_the_models_noise_schedule(pipe, names, scheduler, settings):
    """Whatever the model's own scheduler is set to: a name without Karras is without it."""
    trained = {
        "beta_start": 0.001,
        "beta_end": 0.011,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
    }
    before = DPMSolverMultistepScheduler(**trained, use_karras_sigmas=True, solver_type="heun")
    for name in names:
        pipe.scheduler = copy.deepcopy(before)
        set_scheduler(pipe, name)
        assert type(pipe.scheduler).__name__ == f"{scheduler}Scheduler"
        expected = trained | settings
        assert {key: pipe.scheduler.config[key] for key in expected} == expected
        recipe = output.recipe(pipe, Request("a", 0), Options())
        karras = recipe.get("scheduler_settings", {}).get("use_karras_sigmas", False)
        assert karras == settings.get("use_karras_sigmas", False)


@pytest.mark.parametrize("sampler", [one.label for one in SAMPLERS if one.scheduler != "DPMSolverSDE"])
def test_every_sampler_draws(pipe, sampler):
    """3 steps: with the spacing Karras where the class has it, and as it is."""
    for name in (sampler, f"{sampler} Karras"):
        try:
            set_scheduler(pipe, name)
        except ConfigError as error:
            assert "use_karras_sigmas" in str(error)
            continue
        assert list(generate(pipe, [Request("a", 0)], Options(steps=3, guidance=1)))


def test_karras_alters_the_noise_levels(pipe):
    """It is no word alone: the levels of 5 steps differ, and their first is the model's own in both."""
    levels = []
    for name in ("DPM++ 2M", "DPM++ 2M Karras"):
        set_scheduler(pipe, name)
        pipe.scheduler.set_timesteps(5)
        levels.append(pipe.scheduler.sigmas)
    assert (levels[0][1:-1] - levels[1][1:-1]).abs().min() > 0.01


def test_zero_terminal_snr_stays_and_is_missed_where_it_cannot_be(pipe):
    pipe.scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    set_scheduler(pipe, "DPM++ 2M Karras")
    assert pipe.scheduler.config.rescale_betas_zero_snr
    with pytest.raises(ConfigError, match=r"LMSDiscreteScheduler cannot be used: .*rescale_betas_zero_snr"):
        set_scheduler(pipe, "LMS Karras")


@pytest.mark.parametrize(
    "name", [*MISSING, "dpm_adaptive", "dpmpp_2s_ancestral", "DPM++ 2S a Karras", "heunpp2"]
)
def test_what_diffusers_does_not_have_is_refused_with_the_nearest(pipe, name):
    before = pipe.scheduler
    with pytest.raises(
        ConfigError, match=r"cannot be had: diffusers has no sampler .*; the nearest is .*--list-sch"
    ):
        set_scheduler(pipe, name)
    assert pipe.scheduler is before
    assert all(isinstance(find_sampler(near), Found) for near in MISSING.values())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Euler a Karras", "EulerAncestralDiscreteScheduler of diffusers has no use_karras_sigmas"),
        ("DPM++ 2M KL Optimal", "no schedule of noise levels 'kl optimal'; the nearest is karras"),
        ("DPM++ 2M Align Your Steps", "no schedule of noise levels 'align your steps'"),
        ("DPM++ 2M Karas", "no scheduler 'DPM[+][+] 2M Karas'.*--list-schedulers"),
        ("karras", "no scheduler 'karras'"),
    ],
)
def test_a_spacing_that_cannot_be_is_one_sentence(pipe, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        set_scheduler(pipe, name)


def test_beta_needs_a_package_and_names_what_does_not(pipe, monkeypatch):
    find_spec, before = importlib.util.find_spec, pipe.scheduler
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    with pytest.raises(
        ConfigError, match=r"it needs scipy \(pip install scipy\)\. Without it .* Euler Karras"
    ):
        set_scheduler(pipe, "Euler Beta")
    assert pipe.scheduler is before


def test_dpm_sde_needs_a_package_and_names_what_does_not(pipe):
    if schedulers(pipe)["dpmsolversde"][1]:
        with pytest.raises(ConfigError, match=r"it needs torchsde .*Without it there is DPM\+\+ 2M SDE"):
            set_scheduler(pipe, "DPM++ SDE Karras")
    else:
        set_scheduler(pipe, "DPM++ SDE Karras")
        assert pipe.scheduler.config.use_karras_sigmas


def test_a_picture_says_what_its_scheduler_was_set_to(pipe, tmp_path):
    """And so it can be made again: the recipe's class and settings, put together, draw the same picture."""
    set_scheduler(pipe, "DPM++ 2M SDE Karras")
    options = Options(steps=3, guidance=1)
    [first, _] = write_pictures(pipe, [Request("a", 5)], options, tmp_path)
    found = read_recipe(first)
    assert found["scheduler"] == "DPMSolverMultistepScheduler"
    spacing = {"timestep_spacing": "leading"}  # the model's own
    karras = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    assert found["scheduler_settings"] == karras | spacing
    set_scheduler(pipe, "euler")
    assert output.recipe(pipe, Request("a", 5), options)["scheduler_settings"] == spacing
    base = dict(pipe.scheduler.config)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(base, **found["scheduler_settings"])
    [second, _] = write_pictures(pipe, [Request("a", 5)], options, tmp_path)
    with Image.open(first) as one, Image.open(second) as other:
        assert first != second and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("terminal", [False, True])
def test_all_names_are_listed(terminal, monkeypatch):
    """In a line each, on a terminal too."""
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda self: terminal)
    result = CliRunner().invoke(app, ["sample", "--list-schedulers"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > len(SAMPLERS)
    for name in [*(one.label for one in SAMPLERS), *SPACINGS, *MISSING]:
        assert name in result.output
