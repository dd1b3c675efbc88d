/*
 * The least that a listener does: `kvmi-bare-listener LIBRARY NAME SOCKET FRAME...` attaches through a library with
 * libvmi's C ABI, traps reads and writes of the frames, and has every access completed on guest memory. Prints
 * "listening" once it does, and detaches when its stdin ends. What the engine costs is measured against it.
 */
#include <dlfcn.h>
#include <libvmi/events.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FUNCTIONS(F)                                                                                              \
  F(vmi_init) F(vmi_destroy) F(vmi_get_num_vcpus) F(vmi_init_paging) F(vmi_get_vcpuregs) F(vmi_register_event)   \
  F(vmi_set_mem_event) F(vmi_events_listen)

static struct {
#define MEMBER(name) __typeof__(&name) name;
  FUNCTIONS(MEMBER)
} lib;

/* As long as a listen of the engine's waits. */
enum { LISTEN_MS = 20 };

static vmi_instance_t vmi;
static unsigned long answered;
static atomic_bool ended;

static void die(const char *what, const char *detail) {
  fprintf(stderr, "kvmi-bare-listener: %s: %s\n", what, detail);
  exit(1);
}

static void check(const char *what, status_t status) {
  if (status != VMI_SUCCESS) die(what, "failed");
}

static event_response_t onEvent(vmi_instance_t instance, vmi_event_t *event) {
  (void)instance, (void)event;
  answered++;
  return VMI_EVENT_RESPONSE_NONE;
}

static void load(const char *path) {
  void *library = dlopen(path, RTLD_NOW);
  if (!library) die("load", dlerror());
#define LOAD(name)                     \
  *(void **)&lib.name = dlsym(library, #name); \
  if (!lib.name) die("load", "no " #name);
  FUNCTIONS(LOAD)
}

static void attach(const char *name, char *socket) {
  struct {
    uint64_t count;
    vmi_init_data_entry_t entry;
  } data = {1, {VMI_INIT_DATA_KVMI_SOCKET, socket}};
  check("vmi_init", lib.vmi_init(&vmi, VMI_KVM, name, VMI_INIT_DOMAINNAME | VMI_INIT_EVENTS,
                                 (vmi_init_data_t *)&data, NULL));
  unlink(socket);
  if (lib.vmi_init_paging(vmi, 0) != VMI_PM_IA32E) die("vmi_init_paging", "not four levels");
}

/* The events that the engine's binding registers. */
static void registerEvents(void) {
  static vmi_event_t memory, step;
  memory.version = step.version = VMI_EVENTS_VERSION;
  memory.callback = step.callback = onEvent;
  memory.type = VMI_EVENT_MEMORY;
  memory.mem_event.gfn = ~0ull;
  memory.mem_event.generic = 1;
  memory.mem_event.in_access = VMI_MEMACCESS_R | VMI_MEMACCESS_W | VMI_MEMACCESS_X;
  step.type = VMI_EVENT_SINGLESTEP;
  const unsigned vcpus = lib.vmi_get_num_vcpus(vmi);
  step.ss_event.vcpus = vcpus < MAX_SINGLESTEP_VCPUS ? (1u << vcpus) - 1 : ~0u;
  check("vmi_register_event", lib.vmi_register_event(vmi, &memory));
  check("vmi_register_event", lib.vmi_register_event(vmi, &step));
}

static void setAccess(char **frames, vmi_mem_access_t access) {
  for (; *frames; frames++) {
    const addr_t gfn = strtoull(*frames, NULL, 0);
    check("vmi_set_mem_event", lib.vmi_set_mem_event(vmi, gfn, access, 0));
  }
}

static void *awaitEnd(void *unused) {
  char ignored[64];
  while (read(STDIN_FILENO, ignored, sizeof ignored) > 0) continue;
  atomic_store(&ended, true);
  return unused;
}

/* Until a whole round of register reads, which every vCPU serves itself, brings no event. */
static void drain(void) {
  unsigned long before;
  do {
    before = answered;
    for (unsigned vcpu = 0; vcpu < lib.vmi_get_num_vcpus(vmi); vcpu++) {
      registers_t registers;
      check("vmi_get_vcpuregs", lib.vmi_get_vcpuregs(vmi, &registers, vcpu));
    }
    check("vmi_events_listen", lib.vmi_events_listen(vmi, 0));
  } while (answered != before);
}

int main(int argc, char **argv) {
  if (argc < 4) die("usage", "kvmi-bare-listener LIBRARY NAME SOCKET FRAME...");
  char **frames = argv + 4;
  load(argv[1]);
  attach(argv[2], argv[3]);
  registerEvents();
  setAccess(frames, VMI_MEMACCESS_R | VMI_MEMACCESS_W);
  pthread_t waiting;
  if (pthread_create(&waiting, NULL, awaitEnd, NULL) != 0) die("pthread_create", "failed");
  puts("listening");
  fflush(stdout);
  while (!atomic_load_explicit(&ended, memory_order_relaxed)) {
    check("vmi_events_listen", lib.vmi_events_listen(vmi, LISTEN_MS));
  }
  setAccess(frames, VMI_MEMACCESS_N);
  drain();
  check("vmi_destroy", lib.vmi_destroy(vmi));
  return 0;
}
