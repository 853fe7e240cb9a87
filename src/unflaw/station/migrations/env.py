"""Run by Alembic with the connection, and inside the transaction, that `log.Log` gives it."""

from alembic import context

from unflaw.station.log import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,  # SQLite's as well, now that its driver leaves transactions alone
)
with context.begin_transaction():
    context.run_migrations()
