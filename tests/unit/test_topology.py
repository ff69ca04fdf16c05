"""Groups in, replicas out; and every mistake of the groups with its own message."""

from __future__ import annotations

import pytest

from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.topology import Deployment, Group, Replica, all_hosts, build, from_group_hosts


def groups(**members: str) -> dict[str, Group]:
    """``name="a b >child"``: hosts, and children after ``>``."""
    made = {}
    for name, text in members.items():
        words = text.split()
        made[name] = Group(
            hosts=tuple(word for word in words if not word.startswith(">")),
            children=tuple(word[1:] for word in words if word.startswith(">")),
        )
    return made


TWO_REPLICAS = groups(
    dsv3=">east >west",
    east=">east_head >east_workers",
    east_head="a",
    east_workers="b c",
    west=">west_head",
    west_head="d",
)


class TestBuild:
    @pytest.mark.parametrize(
        "found",
        [
            groups(dsv3_head="a", dsv3_workers="b c"),
            groups(dsv3=">dsv3_head >dsv3_workers", dsv3_head="a", dsv3_workers="b c"),
            groups(dsv3_head="a", dsv3_workers=">rack1 >rack2", rack1="b", rack2="c"),
            groups(dsv3_head="a", dsv3_workers="b c", other="x y", monitoring_head="m"),
        ],
    )
    def test_one_replica(self, found: dict[str, Group]) -> None:
        assert build(found) == Deployment(replicas=(Replica(name="dsv3", head="a", workers=("b", "c")),))

    def test_a_head_alone_is_a_replica(self) -> None:
        assert build(groups(dsv3_head="a")).hosts == ("a",)

    def test_several_replicas(self) -> None:
        deployment = build(TWO_REPLICAS)
        assert [(r.name, r.head, r.workers) for r in deployment.replicas] == [
            ("east", "a", ("b", "c")),
            ("west", "d", ()),
        ]
        assert deployment.hosts == ("a", "b", "c", "d")
        assert deployment.replica_of("c").name == "east"
        assert deployment.role_of("a") == "head"
        assert deployment.role_of("b") == "worker"
        with pytest.raises(KeyError):
            deployment.replica_of("z")

    def test_a_group_that_contains_itself_ends(self) -> None:
        found = groups(dsv3_head="a", dsv3_workers=">ring", ring="b >dsv3_workers")
        assert build(found).hosts == ("a", "b")


@pytest.mark.parametrize(
    ("found", "messages"),
    [
        pytest.param(groups(web="a"), ["replica 'dsv3' has no head"], id="no groups of ours"),
        pytest.param(groups(dsv3_workers="a b"), ["replica 'dsv3' has no head"], id="workers only"),
        pytest.param(groups(dsv3_head="", dsv3_workers="a"), ["has no head"], id="empty head"),
        pytest.param(groups(dsv3_head="a b"), ["replica 'dsv3' has 2 heads"], id="two heads"),
        pytest.param(groups(dsv3_head="a", dsv3_workers="a b"), ["a is both head and worker"], id="head also a worker"),
        pytest.param(
            groups(dsv3="x >dsv3_head", dsv3_head="a"), ["group 'dsv3' has hosts of its own"], id="host in dsv3"
        ),
        pytest.param(
            groups(dsv3=">dsv3_head >dsv3_worker", dsv3_head="a", dsv3_worker="b"),
            ["group 'dsv3_worker' below 'dsv3' is neither"],
            id="misspelt role",
        ),
        pytest.param(
            groups(dsv3=">dsv3_head >east", dsv3_head="a", east=">east_head", east_head="b"),
            ["one replica and several replicas are described at once"],
            id="both ways at once",
        ),
        pytest.param(
            groups(dsv3=">east >west", east=">east_head", east_head="a", west="b"),
            ["group 'west' below 'dsv3' is neither"],
            id="group without a head group",
        ),
        pytest.param(
            groups(dsv3=">east", east=">east_head >extra", east_head="a", extra="b"),
            ["unknown group 'extra' below replica 'east'"],
            id="unknown group in a replica",
        ),
        pytest.param(
            groups(dsv3=">east", east=">east_head", east_head="a", east_workers="b"),
            ["group 'east_workers' is not a child of replica 'east'"],
            id="workers beside the replica",
        ),
        pytest.param(
            groups(dsv3=">east", east="b >east_head", east_head="a"),
            ["replica group 'east' has hosts of its own"],
            id="host in the replica group",
        ),
        pytest.param(
            groups(
                dsv3=">east >west",
                east=">east_head >east_workers",
                east_head="a",
                east_workers="b",
                west=">west_head >west_workers",
                west_head="c",
                west_workers="b",
            ),
            ["b belongs to two replicas"],
            id="host in two replicas",
        ),
        pytest.param(
            groups(dsv3=">east >west", east=">east_head", east_head="", west=">west_head", west_head="c d"),
            ["replica 'east' has no head", "replica 'west' has 2 heads"],
            id="all mistakes at once",
        ),
    ],
)
def test_wrong_groups_are_refused(found: dict[str, Group], messages: list[str]) -> None:
    with pytest.raises(ConfigErrors) as caught:
        build(found, source="prod.ini")
    told = [error.message for error in caught.value]
    assert len(told) == len(messages)
    for message, part in zip(told, messages, strict=True):
        assert part in message
    assert all(error.file == "prod.ini" and error.remedy and error.key for error in caught.value)


def test_a_misspelt_head_group_is_suggested() -> None:
    with pytest.raises(ConfigErrors) as caught:
        build(groups(dsv3_heads="a", dsv3_workers="b"))
    assert "did you mean it by [dsv3_heads]" in str(caught.value)


class TestLimited:
    def test_whole_replicas_are_kept(self) -> None:
        assert build(TWO_REPLICAS).limited(["d"]).hosts == ("d",)
        assert build(TWO_REPLICAS).limited("abcd").hosts == ("a", "b", "c", "d")

    @pytest.mark.parametrize(("hosts", "found"), [("bc", "without a (the head)"), ("ab", "without c")])
    def test_a_replica_is_not_cut_in_two(self, hosts: str, found: str) -> None:
        with pytest.raises(ConfigErrors, match="cuts replica 'east' in two") as caught:
            build(TWO_REPLICAS).limited(hosts)
        (error,) = caught.value
        assert (error.found, error.key) == (found, "--limit")
        assert "--limit a,b,c" in error.remedy

    def test_nothing_left(self) -> None:
        with pytest.raises(ConfigErrors, match="leaves no host"):
            build(TWO_REPLICAS).limited(["z"])


class TestInsideAPlay:
    """Ansible's `groups` has all hosts below each group, and groups that the play itself makes."""

    def test_one_replica(self) -> None:
        seen = {"all": ["a", "b"], "dsv3_head": ["a"], "dsv3_workers": ["b"], "dsv3_role_head": ["a"]}
        assert from_group_hosts(seen) == build(groups(dsv3_head="a", dsv3_workers="b"))

    def test_several_replicas(self) -> None:
        seen = {
            "all": list("abcdm"),
            "dsv3": list("abcd"),
            "east": list("abc"),
            "east_head": ["a"],
            "east_workers": ["b", "c"],
            "west": ["d"],
            "west_head": ["d"],
            "dsv3_role_head": ["a", "d"],
            "monitoring_head": ["m"],
        }
        assert from_group_hosts(seen) == build(TWO_REPLICAS)

    def test_workers_alone_are_refused(self) -> None:
        with pytest.raises(ConfigErrors, match="has no head"):
            from_group_hosts({"all": ["a"], "dsv3_workers": ["a"]})


def test_all_hosts_of_wrong_groups() -> None:
    assert all_hosts(groups(dsv3_head="a b", dsv3_workers="b c", other="z")) == ("a", "b", "c")
