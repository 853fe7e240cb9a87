"""Inspections, with what a person decided."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "inspections",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("source", sa.String),
        sa.Column("detector", sa.String, nullable=False),
        sa.Column("detector_digest", sa.String(64), nullable=False),
        sa.Column("category", sa.String, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("p_value", sa.Double, nullable=False),
        sa.Column("p_estimated", sa.Double),
        sa.Column("threshold", sa.Double, nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("regions", sa.JSON, nullable=False),
        sa.Column("sampled", sa.Boolean, nullable=False),
        sa.Column("decision", sa.String(16)),
        sa.Column("decided_by", sa.String),
        sa.Column("decided_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("source", "digest", name="uq_inspections_source"),
        sqlite_autoincrement=True,  # the id of a record that retention removed is not given again
    )
    for column in ("time", "digest", "verdict"):
        op.create_index(f"ix_inspections_{column}", "inspections", [column])
    waiting = sa.text("decision IS NULL AND (verdict <> 'good' OR sampled)")
    decided = sa.text("decision IS NOT NULL")
    for name, columns, where in (
        ("ix_inspections_waiting", ["id"], waiting),
        ("ix_inspections_decided", ["detector", "category", "decision"], decided),
    ):
        op.create_index(name, "inspections", columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    op.drop_table("inspections")
