"""enable() replaces what it says, once, in modules loaded before and after; disable() undoes it.

Judge: the attributes of transformers' modules as they were.
"""

import importlib
import importlib.metadata
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from ssm.integrations import transformers as integration


@pytest.fixture(autouse=True)
def _disabled():
    integration.disable()
    yield
    integration.disable()


def modules():
    names = [f"transformers.models.{name}.modeling_{name}" for name in integration.FAMILIES]
    return {name: importlib.import_module(name) for name in names}


def attributes():
    """Everything that a level may replace, by identity."""
    found = {}
    for name, module in modules().items():
        family = integration.FAMILIES[name.rpartition("modeling_")[2]]
        found |= {(name, f): vars(module)[f] for f in family.functions}
        found |= {(name, c): vars(getattr(module, c))["forward"] for c in family.methods}
    return found


def replaced(before):
    return {key for key, value in attributes().items() if value is not before[key]}


def in_fresh_process(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_levels_replace_what_they_say():
    before = attributes()
    integration.enable("functions")
    assert {name for _, name in replaced(before)} == {
        name for family in integration.FAMILIES.values() for name in family.functions
    }
    integration.enable()
    assert replaced(before) == set(before)
    integration.enable("functions")
    assert len(replaced(before)) == 5 * len(integration.FAMILIES)
    integration.disable()
    assert not replaced(before)


@pytest.mark.parametrize("level", integration.LEVELS)
def test_enable_twice_is_enable_once(level):
    before = attributes()
    integration.enable(level)
    once = attributes()
    integration.enable(level)
    assert attributes() == once
    assert sum(isinstance(finder, type(integration._FINDER)) for finder in sys.meta_path) == 1
    integration.disable()
    integration.disable()
    assert not replaced(before)
    assert integration._FINDER not in sys.meta_path


def test_what_others_replaced_is_left(monkeypatch):
    modeling = modules()["transformers.models.mamba.modeling_mamba"]
    integration.enable()

    def theirs():
        pass

    monkeypatch.setattr(modeling, "causal_conv1d_fn", theirs)
    assert "causal_conv1d_fn" not in integration.status()["families"]["mamba"]["replaced"]
    integration.disable()
    assert modeling.causal_conv1d_fn is theirs


def test_status():
    modules()
    found = integration.status()
    assert found["level"] is None
    assert found["transformers"] == importlib.metadata.version("transformers")
    assert "cpu" in found["devices"]
    assert set(found["families"]) == set(integration.FAMILIES)
    assert all(f["reason"] == "disabled" and not f["replaced"] for f in found["families"].values())
    integration.enable("mixers")
    found = integration.status()
    assert found["level"] == "mixers"
    assert found["families"]["jamba"] == {
        "imported": True,
        "replaced": [
            "causal_conv1d_fn",
            "causal_conv1d_update",
            "mamba_inner_fn",
            "mamba_selective_scan",
            "mamba_selective_state_update",
            "JambaMambaMixer.forward",
            "JambaRMSNorm.forward",
            "JambaForCausalLM.forward",
        ],
        "reason": "",
    }


def test_unknown_level_is_refused():
    with pytest.raises(ValueError) as caught:
        integration.enable("all")
    assert str(caught.value) == "enable: level must be one of functions, mixers, got 'all'"
    assert integration.status()["level"] is None


def test_absent_transformers_is_refused(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(RuntimeError) as caught:
        integration.enable()
    assert str(caught.value) == "enable: transformers must be installed, got no such package"
    assert integration.status()["transformers"] is None


def test_versions_are_checked(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(RuntimeError) as caught:
        integration.enable()
    assert str(caught.value) == "enable: transformers must be version 5 or later, got 4.57.1"
    assert integration.status()["level"] is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.99.0")
    with pytest.raises(RuntimeError) as caught:
        integration.enable("mixers")
    sentence = "enable: level mixers must have transformers 5.23.*, got 5.99.0"
    assert str(caught.value) == sentence
    with pytest.warns(UserWarning, match=r"enable: transformers 5\.99\.0 was not tested"):
        integration.enable("functions")
    assert not integration.status()["tested"]
    assert integration.status()["families"]["mamba"]["replaced"]


def test_a_family_that_changed_is_left_as_it_is(monkeypatch):
    before = attributes()
    modeling = modules()["transformers.models.bamba.modeling_bamba"]
    monkeypatch.delattr(modeling, "mamba2_chunk_scan")
    sentence = "transformers.models.bamba.modeling_bamba has no function mamba2_chunk_scan"
    with pytest.warns(UserWarning, match=sentence):
        integration.enable("mixers")
    found = integration.status()["families"]
    assert found["bamba"] == {"imported": True, "replaced": [], "reason": sentence}
    assert found["mamba2"]["replaced"]
    integration.disable()
    monkeypatch.undo()
    assert not replaced(before)


def test_modules_that_are_imported_later_are_served():
    out = in_fresh_process(
        """
        import sys
        from ssm.integrations import transformers as integration
        integration.enable("functions")
        assert "transformers" not in sys.modules
        assert not integration.status()["families"]["mamba"]["imported"]
        from transformers.models.mamba import modeling_mamba
        from transformers import Mamba2Config, Mamba2Model
        found = integration.status()["families"]
        assert len(found["mamba"]["replaced"]) == 5 and found["mamba"]["reason"] == ""
        assert not found["jamba"]["imported"]
        assert "will be replaced" in found["jamba"]["reason"]
        Mamba2Model(Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1))
        assert len(integration.status()["families"]["mamba2"]["replaced"]) == 5
        spec = modeling_mamba.__spec__
        assert type(spec.loader).__module__.startswith("_frozen_importlib"), spec.loader
        assert "def mamba_selective_scan" in spec.loader.get_source(spec.name)
        served = modeling_mamba.causal_conv1d_fn
        integration.disable()
        assert modeling_mamba.causal_conv1d_fn is served.__wrapped__
        from transformers.models.jamba import modeling_jamba
        assert not hasattr(modeling_jamba.mamba_selective_scan, "__wrapped__") or (
            modeling_jamba.mamba_selective_scan.__module__.startswith("transformers")
        )
        print("done")
        """
    )
    assert out.endswith("done\n")


def test_importing_ssm_imports_no_transformers():
    in_fresh_process(
        """
        import sys
        import ssm, ssm.models.lm, ssm.compat.mamba_ssm
        import ssm.integrations.transformers as integration
        integration.status()
        assert "transformers" not in sys.modules
        assert not any("Finder" in type(f).__name__ and "ssm" in type(f).__module__
                       for f in sys.meta_path)
        """
    )


def test_nothing_is_served_without_kernels():
    in_fresh_process(
        """
        import sys, warnings
        sys.modules["ssm_kernels"] = None  # importing it fails
        import torch
        from transformers.models.mamba import modeling_mamba
        from ssm.integrations import transformers as integration
        plain = modeling_mamba.causal_conv1d_fn
        calls = []
        def original(*args, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)
        modeling_mamba.causal_conv1d_fn = original
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            integration.enable("mixers")
        (warning,) = said
        sentence = "enable: kernels must load to serve the models, which are left to transformers"
        assert str(warning.message).startswith(sentence + ", got "), warning
        assert "the cpu kernels did not load: ModuleNotFoundError" in str(warning.message)
        assert integration.status()["devices"] == []
        model = modeling_mamba.MambaModel(modeling_mamba.MambaConfig(
            hidden_size=16, num_hidden_layers=2, vocab_size=8))
        model(torch.tensor([[1, 2, 3]]))
        assert len(calls) == 2
        """
    )
