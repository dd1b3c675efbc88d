/*
 * Runs generated code natively and says how long it took; for `npm run bench:handlers`. On stdin: a `header`, the
 * offsets of the functions in the code, the order of the switch's cases for each pattern, and the code itself, which
 * belongs at `address`. On stdout: the cycles of every run, as 64-bit numbers, by round, pattern and function.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <x86intrin.h>

struct header {
  uint64_t address;
  uint32_t code_size;
  uint32_t functions;
  uint32_t patterns;
  /* Switches in one run of a function; a multiple of `PIECES`. */
  uint32_t switches;
  uint32_t rounds;
};

/* Does `count` switches on what `order` holds; `image` is what the base register of the switch has to be. */
typedef void (*function)(uint64_t count, const uint32_t *order, uint64_t image);

enum { STACK_SIZE = 1 << 20, PIECES = 8 };

static struct header header;
static uint32_t *offsets;
static uint32_t *orders;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void *read_array(size_t count, size_t size) {
  void *array = calloc(count, size);
  if (array == NULL) die("memory");
  if (fread(array, size, count, stdin) != count) die("stdin");
  return array;
}

static uint64_t cycles_of_piece(function run, const uint32_t *order) {
  unsigned processor;
  _mm_lfence();
  uint64_t from = __rdtsc();
  _mm_lfence();
  run(header.switches / PIECES, order, header.address);
  uint64_t to = __rdtscp(&processor);
  _mm_lfence();
  return to - from;
}

static int compare(const void *a, const void *b) {
  uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return (left > right) - (left < right);
}

/* What a run takes by itself: the pieces that other programs interrupt are no more than half of them. */
static uint64_t cycles_of(function run, const uint32_t *order) {
  uint64_t pieces[PIECES];
  for (uint32_t at = 0; at < PIECES; at++) pieces[at] = cycles_of_piece(run, order + at * (header.switches / PIECES));
  qsort(pieces, PIECES, sizeof *pieces, compare);
  return (pieces[PIECES / 2 - 1] + pieces[PIECES / 2]) * (PIECES / 2);
}

static void *run_all(void *unused) {
  for (uint32_t round = 0; round < header.rounds; round++) {
    for (uint32_t pattern = 0; pattern < header.patterns; pattern++) {
      const uint32_t *order = orders + (size_t)pattern * header.switches;
      for (uint32_t at = 0; at < header.functions; at++) {
        uint64_t cycles = cycles_of((function)(header.address + offsets[at]), order);
        if (fwrite(&cycles, sizeof cycles, 1, stdout) != 1) die("stdout");
      }
    }
  }
  return unused;
}

int main(void) {
  if (fread(&header, sizeof header, 1, stdin) != 1) die("stdin");
  offsets = read_array(header.functions, sizeof *offsets);
  orders = read_array((size_t)header.patterns * header.switches, sizeof *orders);
  void *code = mmap((void *)header.address, header.code_size, PROT_READ | PROT_WRITE | PROT_EXEC,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (code == MAP_FAILED) die("memory that is writable and executable");
  if (fread(code, header.code_size, 1, stdin) != 1) die("stdin");

  /* A stack of its own, always aligned alike: some handlers push. */
  void *stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pthread_attr_t attributes;
  pthread_t thread;
  if (stack == MAP_FAILED || pthread_attr_init(&attributes) || pthread_attr_setstack(&attributes, stack, STACK_SIZE) ||
      pthread_create(&thread, &attributes, run_all, NULL) || pthread_join(thread, NULL))
    die("thread");
  return fflush(stdout) == 0 ? 0 : 1;
}
