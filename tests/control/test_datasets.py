import numpy as np
import pytest
import torch

from vgf_llm.control import OfflineDataset, ReplayBuffer
from vgf_llm.control.networks import SeededNoise


def arrays(T=12, episode=4):
    draws = np.random.default_rng(0)
    obs = draws.standard_normal((T, 3))
    return {
        "obs": obs,
        "actions": draws.uniform(-1, 1, (T, 2)),
        "rewards": draws.standard_normal(T),
        "next_obs": np.concatenate([obs[1:], draws.standard_normal((1, 3))]),
        "masks": np.ones(T),
        "ends": np.arange(T) % episode == episode - 1,
    }


def test_arrays_are_copied_and_actions_kept_inside():
    columns = arrays()
    columns["actions"][0] = 1.0
    data = OfflineDataset.from_arrays(**columns)
    assert (len(data), data.obs_dim, data.action_dim) == (12, 3, 2)
    assert data.actions.abs().max() == pytest.approx(1 - 1e-5)
    columns["obs"][:] = 0
    assert data.obs.abs().min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rewards"].__setitem__(5, np.nan), "rewards hold nan or infinity, first in row 5"),
        (lambda c: c["obs"].__setitem__((2, 1), np.inf), "observations hold nan or infinity, first in row 2"),
        (lambda c: c["actions"].__setitem__((3, 0), 1.7), r"actions must lie in \[-1, 1\], row 3"),
        (lambda c: c.__setitem__("rewards", c["rewards"][:-1]), "rewards must be 1-dimensional with 12 rows"),
        (lambda c: c.__setitem__("next_obs", c["next_obs"][:, :2]), "differ in size"),
        (lambda c: c["masks"].__setitem__(0, 0.5), "masks must be 0 or 1"),
        (lambda c: c.update({k: v[:0] for k, v in c.items()}), "no transition"),
    ],
)
def test_bad_arrays(change, message):
    columns = arrays()
    change(columns)
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(**columns)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_n_step_sums_stop_at_ends_and_at_the_goal(n):
    columns = arrays()
    columns["masks"][5] = 0  # reached within a trajectory: nothing counts after it
    data = OfflineDataset.from_arrays(**columns)
    rows = data.n_step(n, 0.9)
    for i in range(12):
        total, k = 0.0, 0
        while True:
            total += 0.9**k * columns["rewards"][i + k]
            if k + 1 == n or columns["ends"][i + k] or columns["masks"][i + k] == 0:
                break
            k += 1
        assert rows["rewards"][i].item() == pytest.approx(total, abs=1e-5)
        assert torch.equal(rows["next_obs"][i], data.next_obs[i + k])
        assert rows["discounts"][i].item() == pytest.approx(0.9 ** (k + 1) * columns["masks"][i + k])


def test_the_buffer_grows_per_seed_and_keeps_the_data_set():
    columns = OfflineDataset.from_arrays(**arrays()).n_step(1, 0.9)
    buffer = ReplayBuffer(columns, seeds=2, room=3)
    new = {name: torch.full_like(column[:2], 5.0) for name, column in columns.items()}
    buffer.add(1, new)
    buffer.add(1, {name: column + 1 for name, column in new.items()})  # one more than there is room
    noise = SeededNoise((0, 1))
    drawn = torch.cat([buffer.sample(64, noise).rewards for _ in range(5)], dim=1)
    assert not (drawn[0] >= 5).any()
    assert set(drawn[1][drawn[1] >= 5].tolist()) == {5.0, 6.0}
    assert set(drawn[0].tolist()) == set(columns["rewards"].tolist())
    assert set(buffer.own(1)["rewards"].tolist()) == {5.0, 6.0}
    assert len(buffer.own(0)["rewards"]) == 0
    with pytest.raises(ValueError, match="room for 3"):
        buffer.add(0, {name: column[:4] for name, column in columns.items()})


def test_half_of_a_draw_may_be_of_what_a_seed_collected():
    columns = OfflineDataset.from_arrays(**arrays()).n_step(1, 0.9)
    buffer = ReplayBuffer(columns, seeds=2, room=50, share=0.5)
    buffer.add(1, {name: torch.full_like(column[:2], 5.0) for name, column in columns.items()})
    drawn = buffer.sample(40, SeededNoise((0, 1))).rewards
    assert (drawn >= 5).sum(1).tolist() == [0, 20]  # the first has nothing of its own yet
    assert set(drawn[0].tolist()) <= set(columns["rewards"].tolist())


def test_cached_particles_follow_their_transitions():
    columns = OfflineDataset.from_arrays(**arrays()).n_step(1, 0.9)
    cached = columns["rewards"][None, :, None, None].expand(2, 12, 3, 1).clone()
    buffer = ReplayBuffer(columns, seeds=2, room=2, particles=cached)
    rows = {name: column[:1] + 9 for name, column in columns.items()}
    with pytest.raises(ValueError, match="cached particles"):
        buffer.add(0, rows)
    buffer.add(0, rows, rows["rewards"][:, None, None].expand(1, 3, 1))
    batch = buffer.sample(200, SeededNoise((0, 1)))
    assert torch.equal(batch.particles[..., 0, 0], batch.rewards)


def test_return_span_and_rescaling():
    data = OfflineDataset.from_arrays(**arrays())
    returns = data.rewards.view(3, 4).sum(1)
    assert data.return_span() == pytest.approx((returns.max() - returns.min()).item(), rel=1e-5)
    torch.testing.assert_close(data.rescaled(2.0, -1.0).rewards, 2 * data.rewards - 1)
    flat = arrays()
    flat["rewards"][:] = 1
    with pytest.raises(ValueError, match="same return"):
        OfflineDataset.from_arrays(**flat).return_span()


def write_hdf5(path, **changes):
    h5py = pytest.importorskip("h5py", reason="needs the extra vgf_llm[control]")
    draws = np.random.default_rng(0)
    columns = {
        "observations": draws.standard_normal((10, 3)),
        "actions": draws.uniform(-1, 1, (10, 2)),
        "rewards": draws.standard_normal(10),
        "terminals": np.arange(10) == 3,
        "timeouts": np.arange(10) == 7,
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            if column is not None:
                file[name] = column
    return columns


def test_d4rl_files(tmp_path):
    columns = write_hdf5(tmp_path / "a.hdf5")
    data = OfflineDataset.from_d4rl_hdf5(tmp_path / "a.hdf5")
    # Dropped: the timeout, and the last step of the file, whose successors are unknown.
    kept = [0, 1, 2, 3, 4, 5, 6, 8]
    np.testing.assert_allclose(data.obs, columns["observations"][kept], rtol=1e-6)
    np.testing.assert_allclose(data.next_obs[4], columns["observations"][5], rtol=1e-6)
    assert data.masks.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert data.ends.tolist() == [False, False, False, True, False, False, True, True]


def test_d4rl_files_with_next_observations(tmp_path):
    obs = np.random.default_rng(1).standard_normal((10, 3))
    successors = np.concatenate([obs[1:], obs[:1]])
    successors[5] += 1  # the next row does not go on from here
    write_hdf5(tmp_path / "a.hdf5", observations=obs, next_observations=successors)
    data = OfflineDataset.from_d4rl_hdf5(tmp_path / "a.hdf5")
    assert len(data) == 10
    assert data.ends.nonzero().flatten().tolist() == [3, 5, 7, 9]


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "none.hdf5")
    write_hdf5(tmp_path / "a.hdf5", rewards=None)
    with pytest.raises(ValueError, match="lacks rewards; it holds actions"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "a.hdf5")
    write_hdf5(tmp_path / "b.hdf5", rewards=np.zeros(9))
    with pytest.raises(ValueError, match="columns differ in length"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "b.hdf5")
    write_hdf5(tmp_path / "c.hdf5")
    whole = (tmp_path / "c.hdf5").read_bytes()
    (tmp_path / "c.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no complete HDF5 file"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "c.hdf5")


def test_minari_sets(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="needs the extra vgf_llm[control]")
    import gymnasium
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    draws = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            id=i,
            observations=draws.uniform(-1, 1, (21, 3)).astype(np.float32),
            actions=draws.uniform(-1, 1, (20, 1)).astype(np.float32),
            rewards=[0.5] * 20,
            terminations=[False] * 20,
            truncations=[False] * 19 + [True],
        )
        for i in range(2)
    ]
    minari.create_dataset_from_buffers(
        "pendulum/test-v0", buffer=episodes, env=gymnasium.make("Pendulum-v1"), algorithm_name="none",
        code_permalink="-", author="a", author_email="a@b.c", description="two episodes", eval_env="Pendulum-v1",
    )  # fmt: skip
    data = OfflineDataset.from_minari("pendulum/test-v0", download=False)
    assert (len(data), data.obs_dim, data.action_dim) == (40, 3, 1)
    assert torch.equal(data.next_obs[:19], data.obs[1:20])
    assert data.ends.nonzero().flatten().tolist() == [19, 39]
    with pytest.raises(ValueError, match="vgf control generate"):
        OfflineDataset.from_minari("pendulum/absent-v0", download=False)
