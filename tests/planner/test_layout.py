"""Candidates: every sensible layout, and none that config_rules.validate would refuse."""

from dataclasses import replace

import pytest

from megat2i.config import (
    Config,
    ConfigError,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    VocabConfig,
)
from megat2i.config_rules import validate
from megat2i.planner.layout import Job, Layout, candidates, rank_stages
from megat2i.planner.speed import rank_parameters

SETTINGS = Config(
    vocab=VocabConfig(text_tokens=50_277, image_codes=16_384),
    data=DataConfig(train=[DatasetConfig("x")], sequence_length=1152),
    model=ModelConfig(hidden=1536, layers=10, heads=12, ffn=3072),
    training=TrainingConfig(global_batch_size=64),
)
JOB = Job.of(SETTINGS)


def settings_of(layout: Layout) -> Config:
    parallel = ParallelConfig(
        layout.tensor, layout.pipeline, layout.sequence, layout.schedule, layout.virtual_stages, layout.recompute
    )
    training = replace(SETTINGS.training, micro_batch_size=layout.micro_batch)
    return replace(SETTINGS, parallel=parallel, training=training)


def test_a_job_counts_what_may_receive_probability():
    assert (JOB.rows, JOB.columns, JOB.tokens) == (66_816, 50_277 + 7 + 16_384, 64 * 1152)


def test_every_candidate_can_be_trained():
    layouts = list(candidates(JOB, 16))
    assert len(layouts) == len(set(layouts)) > 100
    for layout in layouts:
        assert layout.gpus == 16
        assert layout.micro_batches(JOB) >= layout.pipeline
        validate(settings_of(layout), 16)


def test_a_layout_that_is_no_candidate_is_refused():
    """Negative control of the test above: validate does tell layouts apart."""
    for wrong in (Layout(8, 1, 2, 1), Layout(1, 16, 1, 1), Layout(1, 4, 4, 4, False, "interleaved", 3)):
        assert wrong not in set(candidates(JOB, 16))
        with pytest.raises(ConfigError):
            validate(settings_of(wrong), 16)


def test_the_sensible_sizes_are_there():
    layouts = list(candidates(JOB, 16))
    assert {layout.tensor for layout in layouts} == {1, 2, 4}  # 12 heads do not divide by 8
    assert {layout.pipeline for layout in layouts} == {1, 2, 4, 8}  # 16 is more than the layers
    assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
    assert {layout.schedule for layout in layouts} == {"1f1b", "interleaved", "zero_bubble"}
    assert all(not layout.sequence for layout in layouts if layout.tensor == 1)


def test_key_heads_bound_tensor_and_tied_tables_forbid_pipeline_parallelism():
    grouped = replace(JOB, shape=replace(JOB.shape, kv_heads=2))
    assert {layout.tensor for layout in candidates(grouped, 16)} == {1, 2}
    tied = replace(JOB, shape=replace(JOB.shape, tied_embeddings=True))
    assert {layout.pipeline for layout in candidates(tied, 16)} == {1}
    tables = [rank_parameters(job, Layout(1, 1, 16, 1), 0) for job in (JOB, tied)]
    assert tables[0] - tables[1] == JOB.rows * JOB.shape.hidden


def test_ranks_hold_every_pth_stage():
    layout = Layout(1, 2, 1, 1, schedule="interleaved", virtual_stages=2)
    first, second = rank_stages(JOB, layout, 0), rank_stages(JOB, layout, 1)
    assert [first[0].first, second[0].first, first[1].first, second[1].first] == sorted(
        stage.first for stage in first + second
    )
    assert first[0].embedding and second[1].head
