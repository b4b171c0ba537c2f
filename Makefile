# Everything that is done with Bell Jar, by one name each. `make` alone lists them.
# Works on any x86-64 Debian machine; without hardware virtualisation guests run in the emulated host.
.DEFAULT_GOAL := help
.PHONY: help run test bench verify-hw soak fuzz setup build kernel image rootfs fmt lint unit e2e clean

# rustup's place, for shells that do not have it in their path yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

help: ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

run: ## build all, boot a guest, run a Python line and a shell pipeline in it
	@scripts/run

test: ## format, lint, unit tests, end-to-end tests in real guests
	@scripts/test

bench: setup ## measure boot, vsock, block, memory and restoring on the instruction-counted clock
	@tests/bench/run
	@tests/bench/run restore --recorded

soak: setup ## end-to-end tests again and again: make soak SECONDS=3600
	@scripts/soak $(or $(SECONDS),3600)

fuzz: setup ## coverage-guided fuzzing, then property tests with many cases: make fuzz SECONDS=60 CASES=20000
	@scripts/fuzz $(or $(SECONDS),60)
	PROPTEST_CASES=$(or $(CASES),20000) cargo test --release --workspace --exclude belljar-e2e

verify-hw: ## the same tests on hardware virtualisation, and which CPU it was
	@scripts/verify-hw

build: setup ## the release binaries
	cargo build --release

kernel: setup ## the guest kernel
	@kernel-config/build

image: build ## the guest image, empty disks and the initramfs with the agent
	@rootfs/build

rootfs: image ## the same

setup: ## check for, and as root install, what building and testing needs
	@scripts/setup

fmt: ## format all code
	cargo fmt --all

lint: setup ## clippy, warnings are errors
	@scripts/test format lint

unit: setup ## unit tests
	@scripts/test unit

e2e: setup ## end-to-end tests in real guests
	@scripts/test e2e

clean: ## remove what was built here; kernels and images stay in the cache
	cargo clean
