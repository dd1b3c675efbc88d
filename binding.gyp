{
  "target_defaults": {
    "cflags_cc": ["-std=c++17", "-O2", "-Wall", "-Wextra"],
    "cflags_cc!": ["-fno-exceptions", "-std=gnu++17", "-std=gnu++20"],
    "cflags": ["-fvisibility=hidden"]
  },
  "targets": [
    {
      # The embedded hypervisor: a Node-API addon over Unicorn (GPL-2.0), loaded by the host process only.
      "target_name": "machine",
      "sources": [
        "native/machine/addon.cc",
        "native/machine/board.cc",
        "native/machine/completion.cc",
        "native/machine/guest_access.cc",
        "native/machine/hidden_state.cc",
        "native/machine/interrupts.cc",
        "native/machine/machine.cc",
        "native/machine/memory.cc",
        "native/machine/page_walk.cc",
        "native/machine/registers.cc",
        "native/machine/single_step.cc",
        "native/machine/vcpu.cc"
      ],
      "include_dirs": [
        "<!(node -p \"require('node-addon-api').include_dir\")",
        ".deps/unicorn/unicorn/include"
      ],
      "defines": ["NAPI_VERSION=8", "NAPI_CPP_EXCEPTIONS"],
      "libraries": [
        "<(module_root_dir)/.deps/unicorn/unicorn/lib/libunicorn.so.2",
        "-Wl,-rpath,'$$ORIGIN/../../.deps/unicorn/unicorn/lib'"
      ]
    },
    {
      # libvmi's C ABI over a KVMI socket; links to nothing of Node.
      "target_name": "kvmi",
      "type": "shared_library",
      "sources": [
        "native/kvmi/connection.cc",
        "native/kvmi/dispatch.cc",
        "native/kvmi/instance.cc",
        "native/kvmi/listener.cc",
        "native/kvmi/pause.cc",
        "native/kvmi/registers.cc",
        "native/kvmi/session.cc",
        "native/vmi/events.cc",
        "native/vmi/log.cc",
        "native/vmi/memory.cc",
        "native/vmi/paging.cc",
        "native/vmi/registers.cc"
      ],
      "include_dirs": ["native/vmi/include"]
    },
    {
      # Drives a library with that ABI from C; for the tests.
      "target_name": "abi-check",
      "type": "executable",
      "sources": ["native/vmi/test/abi_check.c"],
      "include_dirs": ["native/vmi/include"],
      "cflags_c": ["-std=gnu11", "-Wall", "-Wextra"],
      # The library under test sees this program's clock.
      "ldflags": ["-rdynamic"],
      "libraries": ["-ldl"]
    },
    {
      # Stands in for libvirt where the tests run libvmi itself; libvmi finds both parts by name.
      "target_name": "libvirt-stub",
      "type": "shared_library",
      "product_name": "libvirt",
      "product_prefix": "",
      "product_dir": "<(PRODUCT_DIR)/libvirt-stub",
      "sources": ["native/libvirt-stub/libvirt.c"],
      "cflags_c": ["-std=c11", "-Wall", "-Wextra"]
    },
    {
      "target_name": "libvirt-qemu-stub",
      "type": "shared_library",
      "product_name": "libvirt-qemu",
      "product_prefix": "",
      "product_dir": "<(PRODUCT_DIR)/libvirt-stub",
      "sources": ["native/libvirt-stub/libvirt_qemu.c"],
      "cflags_c": ["-std=c11", "-Wall", "-Wextra"]
    },
    {
      # What the engine is compared with; for `npm run bench:events`.
      "target_name": "kvmi-bare-listener",
      "type": "executable",
      "sources": ["native/kvmi/bench/bare_listener.c"],
      "include_dirs": ["native/vmi/include"],
      "cflags_c": ["-std=gnu11", "-O2", "-Wall", "-Wextra"],
      "libraries": ["-ldl", "-pthread"]
    },
    {
      # Runs generated machine code; for `npm run bench:handlers`.
      "target_name": "handlers-run-code",
      "type": "executable",
      "sources": ["native/handlers/bench/run_code.c"],
      "cflags_c": ["-std=gnu11", "-O2", "-Wall", "-Wextra"],
      "libraries": ["-pthread"]
    }
  ]
}
