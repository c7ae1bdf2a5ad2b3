# What to do with this repository. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help build try test test-agent test-vm test-packages test-servers image vm-shell lint audit torture bench install uninstall packages release clean

PREFIX = /usr/local
DESTDIR =
# What `make install` copies; `make uninstall` reads the names of the files there.
STAGE = $(or $(CARGO_TARGET_DIR),target)/stage

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

build: ## the release binary, in target/release/sprat (installs what building needs)
	@scripts/install build run
	@bash -c '. scripts/env.sh && cargo build --release --locked --package sprat'

install: ## into PREFIX (default: /usr/local): [PREFIX=/usr/local] [DESTDIR=]; as root or through sudo
	@scripts/install build run stage
	@scripts/stage "$(STAGE)"
	@bash -c '. scripts/env.sh && as_root env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" "$(STAGE)/sprat/install.sh"'

uninstall: ## removes what `make install` installed; keeps keys, config and state
	@[ -x "$(STAGE)/sprat/install.sh" ] || { echo "nothing is staged in $(STAGE): run make install first"; exit 1; }
	@bash -c '. scripts/env.sh && as_root env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" "$(STAGE)/sprat/install.sh" --uninstall'

packages: ## .deb, .rpm and a tar archive, in target/packages: [OUT=folder]
	@scripts/package $(if $(OUT),"$(OUT)")

image: ## an OCI image from the .deb of `make packages`: [OUT=folder] (needs root or sudo)
	@scripts/oci $(if $(OUT),"$(OUT)")

release: ## version, changelog, commit, tag and packages; pushes nothing: VERSION=1.2.3 [OUT=folder]
	@[ -n "$(VERSION)" ] || { echo "give VERSION=1.2.3"; exit 2; }
	@scripts/release "$(VERSION)" $(if $(OUT),"$(OUT)")

test-packages: ## installs, uses, upgrades and purges the .deb in new systems: [SUITES="bookworm trixie jammy noble"]
	@scripts/test-packages $(SUITES)

test-servers: ## a container's life with the OpenSSH of other systems: [SUITES="bullseye bookworm trixie jammy noble"]
	@scripts/test-servers $(SUITES)

try: ## back up a real folder and restore it: [DIR=/usr/share/doc]; leaves nothing behind
	@scripts/try "$(DIR)"

test: ## every test, those in the VM too (needs root or sudo; installs what is missing)
	@scripts/test

test-agent: ## the tests of the store, of the lock and of the program with sprat-agent as their server
	@SPRAT_TEST_SERVER=agent scripts/test -E '(package(sprat-store) & test(/^(contract|lock)::/)) | (binary(e2e) & test(/^(prune|lock|keys|restore|headers|line|reserve|trips|check|copy|commands)::/) & not test(/^copy::(copy_between_servers_keeps_holes|container_moved_from_usb_to_server_keeps_hard_links)$$/))'

test-vm: ## only the tests in a VM, on a real kernel with dm-crypt: [SUITE=bullseye for the kernel of that Debian]
	@SPRAT_VM_SUITE="$(SUITE)" scripts/test --no-capture -E 'binary(vm)'

vm-shell: ## a shell in a rescue system on a real kernel (a VM; needs no KVM): [WITH=folder to lay over its root]
	@scripts/install vm
	@tests/vm/vm shell $(if $(WITH),--with "$(WITH)")

lint: ## rustfmt, clippy, rustdoc, licences and sources, shellcheck
	@scripts/lint

audit: ## known advisories against our dependencies (needs the network)
	@scripts/install build lint
	@bash -c '. scripts/env.sh && cargo deny --locked check advisories'

torture: ## kill -9, lost connections, power cuts and strikes at each command, 100 rounds (hours): [ROUNDS=100] [SEED=N] [ONLY=agent|hostile|lease|line|power|state|strikes|vm|year]
	@SPRAT_TORTURE_ROUNDS="$(or $(ROUNDS),100)" SPRAT_TORTURE_SEED="$(SEED)" SPRAT_STRIKES=200 SPRAT_TRIM_MIB=800 scripts/test --no-capture -E '(binary(torture) & test(/^$(ONLY)/))$(if $(filter-out vm,$(ONLY)),, | (binary(vm) & test(/^(power|grow|drops)::/)))$(if $(filter-out state,$(ONLY)),, | test(/^old_data::/))$(if $(filter-out year,$(ONLY)),, | test(/^year::/))$(if $(filter-out agent,$(ONLY)),, | (package(sprat-agent) & test(/^(kills|keepers|steps|hostile|mangled|outside|storm|drops|siege|fence|days|full)::/)))$(if $(filter-out lease,$(ONLY)),, | binary(torture_lease) | test(/sleepers::/) | test(takeover_of_scattered))$(if $(ONLY),, | test(/^trim::/) | test(/^recovery::/) | test(come_back_identical) | test(/^lives::/) | test(attributes_of_random) | test(damage_in_a_random) | test(prune_before_the_heal))'

bench: ## sprat beside other tools on slow connections: [QUICK=1] [LINES= LOADS= TOOLS= MEASURES= WORK= WRITE=1] [MICRO=1] [MODES=1] [TRIM=1] [TRIPS=1] [HISTORY=1] [AGENT=1]
	@MODES="$(MODES)" QUICK="$(QUICK)" BENCH_LINES="$(LINES)" LOADS="$(LOADS)" TOOLS="$(TOOLS)" MEASURES="$(MEASURES)" WORK="$(WORK)" WRITE="$(WRITE)" MICRO="$(MICRO)" TRIM="$(TRIM)" TRIPS="$(TRIPS)" HISTORY="$(HISTORY)" AGENT="$(AGENT)" bench/bench

clean: ## what was built
	@bash -c '. scripts/env.sh && cargo clean'
