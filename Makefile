# The commands people type. `make test` is everything CI runs.
.PHONY: test fmt lint unit
test: fmt lint unit

fmt:
	cargo fmt --all --check

lint:
	cargo clippy --workspace --all-targets --locked -- -D warnings

unit:
	cargo test --workspace --locked
