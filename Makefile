# Two front doors: `make demo` and `make test`. Each does its own set-up.
# Others: bench, fuzz, bad-guests, soak, soak-exec, soak-lab, man, lint, unit, unit-all, linux, kernel-build, clean.

SHELL := /bin/bash
PYTHON ?= $(shell tools/find-python 3.11)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit unit-all linux bench fuzz bad-guests soak soak-exec soak-lab man clean packages kernel kernel-build erofs-usr
.DEFAULT_GOAL := demo

demo:
	@tools/need-packages qemu-system-x86_64:qemu-system-x86
	$(PYTHON) -m tinyvmm demo
	$(PYTHON) -m tinyvmm doctor
	$(PYTHON) -m tinyvmm run -- uname -a
	$(PYTHON) -m tinyvmm run -- sh -c 'echo "this is $$(hostname), pid $$$$, in $$PWD"; \
	  echo private > /etc/probe; cat /etc/probe; grep MemTotal /proc/meminfo; mount -t 9p'
	@test ! -e /etc/probe && echo "The guest wrote /etc/probe; this computer has none."

test: packages kernel lint unit-all linux

$(BIN)/pytest: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

packages:
	@tools/need-packages qemu-system-x86_64:qemu-system-x86 iasl:acpica-tools gcc:gcc \
	  man:man-db \
	  git:git cpio:cpio depmod:kmod objdump:binutils lz4:lz4 script:bsdutils diod:diod \
	  sqlite3:sqlite3 qemu-img:qemu-utils mkfs.ext4:e2fsprogs fsck.erofs:erofs-utils getfattr:attr nbdinfo:libnbd-bin socat:socat zsh:zsh passt:passt ip:iproute2 ethtool:ethtool iperf3:iperf3 zstd:zstd rpmbuild:rpm fio:fio dbench:dbench stress-ng:stress-ng \
	  docker-registry:docker-registry htpasswd:apache2-utils skopeo:skopeo umoci:umoci podman:podman zstd:zstd \
	  busybox:busybox-static systemctl:systemd openssl:openssl nbd-client:nbd-client

kernel: $(BIN)/pytest
	@$(BIN)/python -m tinyvmm kernel list --json | grep -q version || \
	  $(BIN)/python -m tinyvmm kernel fetch

# A kernel of our own, of Debian's source: takes a quarter of an hour and more, so no test does it.
kernel-build: $(BIN)/pytest
	@tools/need-packages make:make gcc:gcc ld:binutils flex:flex bison:bison bc:bc perl:perl-base \
	  xz:xz-utils tar:tar
	@test -e /usr/include/gelf.h && ls /usr/src/linux-source-*.tar.* >/dev/null 2>&1 || \
	  tools/need-packages kernel-source:linux-source kernel-source:libelf-dev
	nice -n 19 $(BIN)/python -m tinyvmm kernel build --jobs $(KERNEL_JOBS)
KERNEL_JOBS ?= 2

lint: $(BIN)/pytest
	$(BIN)/ruff format --check tinyvmm tests bench examples
	$(BIN)/ruff check tinyvmm tests bench examples
	$(BIN)/mypy

unit: $(BIN)/pytest
	$(BIN)/python -m pytest -m 'not linux'

# The same on every Python that this computer has, side by side.
unit-all: $(BIN)/pytest
	@tools/unit 3.11 3.12 3.13 3.14

# Labs side by side: one keeps little more than one processor busy, and takes up to 4 GiB.
LABS ?= 2
linux: $(BIN)/pytest
	$(BIN)/python -m pytest tests/linux -m linux -n $(LABS) --dist loadfile --durations=10 \
	  -o faulthandler_timeout=2400

bench: $(BIN)/pytest
	$(BIN)/python -m bench

# Every name of /usr in an EROFS image: compared, here and in a guest, and checked by fsck.erofs.
erofs-usr: $(BIN)/pytest
	$(BIN)/python -m tests.erofs_usr

# Look for inputs that do harm: FUZZ is what to fuzz: ninep, virtio or control. What an input did is told, and
# `python -m tests.fuzz $(FUZZ) FILE` does it again; tests/fuzz/__main__.py says how to keep some.
FUZZ ?= ninep
FUZZ_SECONDS ?= 600
fuzz: $(BIN)/pytest
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	mkdir -p .cache/fuzz/$(FUZZ)
	$(BIN)/python -m tests.fuzz $(FUZZ) .cache/fuzz/$(FUZZ) tests/fuzz/$(FUZZ)_corpus \
	  -max_len=400 -len_control=0 -timeout=60 -max_total_time=$(FUZZ_SECONDS) \
	  -artifact_prefix=.cache/fuzz/

# Play bad guests against every device, on both transports and on its registers, so many times as
# long as the tests do.
BAD_GUESTS ?= 20
bad-guests: $(BIN)/pytest
	BAD_GUESTS=$(BAD_GUESTS) CHAOS=$(BAD_GUESTS) $(BIN)/python -m pytest tests/test_bad_guests.py tests/test_chaos.py

man:
	mkdir -p docs/man
	$(PYTHON) -m tinyvmm.cli.manual > docs/man/tinyvmm.1

# Machines, one after another and at once, and then nothing left of them. Where this KVM cannot run
# Linux, fewer of those, in the lab.
soak: packages kernel
	$(BIN)/python -m tests.soak tiny
	$(BIN)/python -m tests.soak linux

# Very many commands in one machine, some of them killed and some clients: is anything left?
SOAK_EXECS ?= 1000
soak-exec: packages kernel
	TINYVMM_SOAK_EXECS=$(SOAK_EXECS) $(BIN)/python -m pytest -s tests/linux/test_control.py -k leave_nothing

# The lab, guest after guest: does it hang?
soak-lab: packages kernel
	$(BIN)/python -m tests.soak lab

clean:
	rm -rf .venv .venv-* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
