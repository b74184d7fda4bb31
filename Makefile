# The commands people type. `make test` is everything CI runs.
.PHONY: demo bench bench-cloud deny fuzz test fmt lint unit clients stories stories-full lab lab-down
# Builds all it needs, makes an AMI, launches it, and shows the main job.
demo:
	tests/demo

# hutch beside QEMU: a table, and target/bench/latest.json.
bench:
	tests/bench/run

# hutchd with 10,000 simulated instances, and 64 clients at once.
bench-cloud:
	tests/clients/run bench

test: fmt lint unit clients stories

fmt:
	cargo fmt --all --check

lint:
	cargo clippy --workspace --all-targets --locked -- -D warnings

# Fast, without root; a /dev/kvm is used where it opens.
unit:
	cargo test --workspace --exclude hutch-tests --locked

# boto3, the aws CLI, Ansible, Terraform and hutch itself against hutchd on the simulated host.
clients:
	tests/clients/run

# Real guests: directly where KVM can, else in the lab.
stories:
	tests/lab/enter tests/stories

# Whole Debians with cloud-init, some fifteen minutes each in the lab, and a database whose machine is killed 50 times.
stories-full:
	HUTCH_FULL="debian-12 debian-13" tests/lab/enter sh -c \
	  'cargo test --locked -p hutch-tests --test debian -- --ignored --nocapture --test-threads=1 && tests/clients/run debian \
	  && HUTCH_KILLS=50 tests/clients/run real -k database'

# Random bytes with coverage: TIME=600 make fuzz.
fuzz:
	tests/fuzz/run

# Licences and sources of all that is linked.
deny:
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check licenses bans sources

# The lab, kept up between runs.
lab:
	tests/lab/up
lab-down:
	tests/lab/down
