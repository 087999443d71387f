"""What all sites must have alike, and how one that does not is turned away."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.config import parse_run
from fedcore.errors import ClosedError, LayoutError, RefusedError
from fedcore.server.agreement import Agreement, Found
from fedcore.server.service import Server
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

CONFIG = {"peft_type": "LORA", "r": 8, "target_modules": ["q", "v"], "base_model_name_or_path": "x"}


def declared(tokenizer: str = "", **config: Any) -> protocol.Declare:
    return protocol.Declare(
        tensors=[("w", "F32", [1])],
        files={"adapter_config.json": json.dumps({**CONFIG, **config})} if config else {},
        fingerprints={"tokenizer": tokenizer * 64} if tokenizer else {},
    )


def joined(agreement: Agreement, site: str, declare: protocol.Declare) -> str | None:
    """Return why a site is refused; None if it may take part, which is then remembered."""
    found = agreement.compare(site, declare)
    if found.refusal is None:
        agreement.note(site, declare)
    return found.refusal


def test_adapters_that_differ_are_named_by_site_and_by_entry() -> None:
    agreement = Agreement(dict, owner=lambda: "the global model began as that of site 'west'")
    assert joined(agreement, "west", declared(r=8)) is None
    said = joined(agreement, "south", declared(r=4, target_modules=["q"]))
    assert said is not None
    assert "LoRA rank r is 8 at west, 4 at south" in said
    assert 'target_modules is ["q", "v"] at west, ["q"] at south' in said
    assert "the global model began as that of site 'west'" in said
    assert len(said) < 400
    assert joined(agreement, "south", declared(r=8)) is None, "once it is put right"


def test_a_whole_model_and_an_adapter_are_told_apart() -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "west", declared(r=8)) is None
    whole = protocol.Declare(
        tensors=[("w", "F32", [1])],
        files={"config.json": '{"architectures": ["LlamaForCausalLM"]}'},
    )
    said = joined(agreement, "south", whole)
    assert said is not None
    assert "site 'south' shows a whole model (LlamaForCausalLM)" in said
    assert "site 'west' a PEFT adapter (LoRA, r = 8)" in said


@pytest.mark.parametrize(
    "free",
    [{"target_modules": ["v", "q"]}, {"a_later_entry": 3}, {"peft_version": "9"}],
    ids=str,
)
def test_what_says_nothing_of_the_tensors_may_differ(free: dict[str, Any]) -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "a", declared(r=8)) is None
    assert agreement.compare("b", declared(**free)) == Found()


@pytest.mark.parametrize(
    "free",
    [{"base_model_name_or_path": "y"}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}],
    ids=str,
)
def test_what_does_no_harm_may_differ_and_is_noted(free: dict[str, Any]) -> None:
    agreement = Agreement(dict)
    known = {"lora_dropout": 0.0, "init_lora_weights": True}
    assert joined(agreement, "a", declared(**known)) is None
    found = agreement.compare("b", declared(**{**known, **free}))
    assert found.refusal is None
    assert not found.warnings
    assert next(iter(free)) in found.notes[0]


def test_a_way_to_start_that_changes_the_base_may_not_differ() -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "a", declared(init_lora_weights=True)) is None
    assert "init_lora_weights" in (
        joined(agreement, "b", declared(init_lora_weights="pissa")) or ""
    )


def test_a_start_that_changes_the_base_by_chance_is_warned_of_at_every_site() -> None:
    found = Agreement(dict, strict=True).compare("a", declared(init_lora_weights="pissa_niter_4"))
    assert found.refusal is None
    assert "over the changed base only" in found.warnings[0]
    assert not Agreement(dict).compare("a", declared(init_lora_weights="pissa")).warnings


def test_a_tokenizer_that_differs_names_both_sites() -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "a", declared("1")) is None
    assert joined(agreement, "c", declared()) is None, "a site may have none to show"
    said = joined(agreement, "b", declared("2"))
    assert said is not None
    assert "tokenizer of site 'b' (sha256 222222222222) is not that of site 'a'" in said


def test_a_site_may_come_again_with_another_config_while_no_other_differs() -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "a", declared("1", r=8)) is None
    assert joined(agreement, "a", declared("2", r=4)) is None
    assert joined(agreement, "b", declared("2", r=4)) is None


def test_a_site_that_is_forgotten_is_compared_with_nobody() -> None:
    agreement = Agreement(dict)
    assert joined(agreement, "a", declared("1", r=8)) is None
    assert joined(agreement, "b", declared("2", r=4)) is not None
    agreement.forget("a")
    assert joined(agreement, "b", declared("2", r=4)) is None


def test_the_config_of_the_initial_model_counts_too() -> None:
    agreement = Agreement(lambda: {"adapter_config.json": json.dumps(CONFIG)})
    said = joined(agreement, "a", declared(r=2))
    assert said is not None
    assert "is not that of the run's initial model: LoRA rank r is 8 at the initial model" in said


def frozen(**digests: str) -> protocol.Declare:
    groups = [(name, "float", 1, digit * 32) for name, digit in digests.items()]
    return declared(r=8).model_copy(update={"frozen": groups})


def test_a_base_that_differs_is_warned_of_with_its_tensors_and_sites() -> None:
    agreement = Agreement(dict)
    for site in ("north", "east"):
        assert joined(agreement, site, frozen(head="1", norm="2", embedding="3")) is None
    found = agreement.compare("south", frozen(head="1", norm="4", embedding="5"))
    assert found.refusal is None
    assert "the base of site 'south' is not that of sites 'north', 'east'" in found.warnings[0]
    assert "2 of 3 groups of what is frozen differ: embedding, norm" in found.warnings[0]


def test_a_base_that_differs_is_refused_where_the_run_file_says_so() -> None:
    agreement = Agreement(dict, strict=True)
    assert joined(agreement, "north", frozen(head="1")) is None
    assert "head" in (joined(agreement, "south", frozen(head="2")) or "")
    assert joined(agreement, "south", frozen(head="1")) is None


def test_the_base_is_compared_after_a_restart_until_a_key_is_revoked(tmp_path: Path) -> None:
    settings = {"run": {"name": "t"}}
    store = Store(tmp_path, settings)
    agreement = Agreement(store.files, strict=True, memory=store)
    for site in ("north", "passing"):
        assert joined(agreement, site, frozen(head="1")) is None
    store.add_member("north")
    store.close()
    store = Store(tmp_path, settings)
    agreement = Agreement(store.files, strict=True, memory=store)
    assert agreement.sites() == ["north"], "who is neither in a model nor expected keeps nobody out"
    assert joined(agreement, "south", frozen(head="2")) is not None
    agreement.forget("north")
    assert joined(agreement, "south", frozen(head="2")) is None
    store.close()


def test_sites_that_say_other_roles_are_refused_and_those_that_say_none_are_not(
    tmp_path: Path,
) -> None:
    def roles(*places: int) -> protocol.Declare:
        names = ("norm.running_mean", "norm.running_var", "w")
        said = [protocol.OfRole(role="buffer", tensors=list(places))] if places else []
        return protocol.Declare(tensors=[(name, "F32", [1]) for name in names], roles=said)

    store = Store(tmp_path, {})
    agreement = Agreement(dict, memory=store)
    assert joined(agreement, "arrays", declared()) is None
    assert agreement.buffers is None
    assert joined(agreement, "west", roles(0, 1)) is None
    assert agreement.buffers == ("norm.running_mean", "norm.running_var")
    store.add_member("west")
    store.close()
    store = Store(tmp_path, {})
    agreement = Agreement(store.files, memory=store)
    assert agreement.buffers == ("norm.running_mean", "norm.running_var")
    said = joined(agreement, "south", roles(0))
    assert said is not None
    assert "'norm.running_var' is a parameter at site 'south' and a buffer at site 'west'" in said
    assert joined(agreement, "south", roles()) is not None
    assert joined(agreement, "south", roles(1, 0)) is None
    assert joined(agreement, "east", declared()) is None
    store.close()


def test_where_all_must_say_roles_no_site_alone_names_buffers() -> None:
    def roles(*places: int) -> protocol.Declare:
        said = [protocol.OfRole(role="buffer", tensors=list(places))] if places else []
        return protocol.Declare(tensors=[("v", "F32", [1]), ("w", "F32", [1])], roles=said)

    agreement = Agreement(dict)
    assert joined(agreement, "arrays", declared()) is None
    found = agreement.compare("lone", roles(0, 1), all_say_roles=True).refusal
    assert found is not None
    assert "'v' is a buffer at site 'lone', and site 'arrays' names no buffers" in found
    assert agreement.compare("west", roles(), all_say_roles=True).refusal is None
    other = Agreement(dict)
    assert joined(other, "lone", roles(0)) is None
    assert other.compare("like it", roles(0), all_say_roles=True).refusal is None
    for unlike in (declared(), roles(), roles(1)):
        assert other.compare("arrays", unlike, all_say_roles=True).refusal is not None


def test_a_role_that_a_tensors_dtype_cant_have_is_refused() -> None:
    for dtype, role in (("F32", "integer"), ("I64", "buffer"), ("I64", "parameter")):
        of = [protocol.OfRole(role=role, tensors=[0])]  # type: ignore[arg-type]
        declare = protocol.Declare(tensors=[("n", dtype, [1])], roles=of)
        with pytest.raises(LayoutError, match=f"'n' of dtype {dtype} can't be of role '{role}'"):
            Agreement(dict).compare("a", declare)


def test_the_configs_of_models_that_are_trained_whole_are_compared() -> None:
    def whole(**values: Any) -> protocol.Declare:
        return protocol.Declare(
            tensors=[("w", "F32", [1])],
            files={"config.json": json.dumps({"rope_theta": 1e4, "use_cache": True, **values})},
        )

    agreement = Agreement(dict)
    assert joined(agreement, "a", whole()) is None
    assert agreement.compare("b", whole(use_cache=False, attention_dropout=0.1)) == Found()
    found = agreement.compare("b", whole(rope_theta=1e6))
    assert "rope_theta is 10000.0 at a, 1000000.0 at b" in found.warnings[0]


def test_of_two_sites_with_unlike_tokenizers_one_is_refused_with_both_names(tmp_path: Path) -> None:
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 1},
            "participants": {"sites": ["north", "south"], "round_deadline": "300s"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)
    sessions = [Session(SiteSettings(server.endpoint, site)) for site in ("north", "south")]

    def take_part(session: Session, digit: str) -> str:
        try:
            session.is_running()
            session.begin(
                [("w", "F32", [1])], {}, lambda _: memoryview(bytes(4)), {"tokenizer": digit * 64}
            )
        except RefusedError as error:
            for other in sessions:
                other.close()
            return str(error)
        except ClosedError:
            pass
        return ""

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(server.run)
        found = list(pool.map(take_part, sessions, "12"))
        server.stop()
        serving.result(200)
    refused = [text for text in found if text]
    assert len(refused) == 1, found
    assert "tokenizer" in refused[0]
    assert "'north'" in refused[0]
    assert "'south'" in refused[0]


def test_a_base_that_differs_is_named_in_the_logs_of_the_server_and_of_the_site(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 1},
            "participants": {"sites": ["north", "south"], "round_deadline": "300s"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)

    def take_part(site: str, digit: str) -> None:
        session = Session(SiteSettings(server.endpoint, site))
        group = [("model.norm.weight", "float", 1, digit * 32)]
        while session.is_running():
            session.begin([("w", "F32", [1])], {}, lambda _: memoryview(bytes(4)), {}, group)
            if session.model is not None and session.model.trains:
                session.submit(lambda _: memoryview(bytes(4)), 1)
            else:
                session.end_task()
        session.close()

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(server.run)
        list(pool.map(take_part, ["north", "south"], "12"))
        assert serving.result(200).ok
    said = [r for r in caplog.records if "model.norm.weight" in r.getMessage()]
    assert {record.name for record in said} == {"fedcore.server", "fedcore.client"}
    assert all("'north'" in r.getMessage() and "'south'" in r.getMessage() for r in said)
