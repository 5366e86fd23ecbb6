// The instructions of AMX, in C, with the checks for which the processor faults: Intel 64 and IA-32 Architectures
// Software Developer's Manual, volume 2, "TDPBSSD/TDPBSUD/TDPBUSD/TDPBUUD" and "LDTILECFG".
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REGISTERS = 8, ROWS = 16, BYTES = 64 };

static __thread struct {
  int configured;
  int rows[REGISTERS], bytes[REGISTERS];
  uint8_t data[REGISTERS][ROWS][BYTES];
} unit;

static void require(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "AMX: %s\n", what);
  abort();
}

void t3c_ldtilecfg(const uint8_t* config) {
  require(config[0] == 1, "palette");
  for (int i = 1; i < 16; ++i) require(config[i] == 0, "reserved bytes");
  memset(&unit, 0, sizeof unit);
  unit.configured = 1;
  for (int t = 0; t < REGISTERS; ++t) {
    unit.bytes[t] = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    unit.rows[t] = config[48 + t];
    require(unit.rows[t] <= ROWS && unit.bytes[t] <= BYTES, "a register is too large");
    require((unit.rows[t] == 0) == (unit.bytes[t] == 0), "a register has rows or columns alone");
  }
}

void t3c_tilerelease(void) { memset(&unit, 0, sizeof unit); }

static void use(int t) { require(unit.configured && t >= 0 && t < REGISTERS && unit.rows[t], "an unshaped register"); }

void t3c_tilezero(int8_t t) {
  use(t);
  memset(unit.data[t], 0, sizeof unit.data[t]);
}

void t3c_tileloadd64(int8_t t, const uint8_t* at, int64_t step) {
  t3c_tilezero(t);
  for (int r = 0; r < unit.rows[t]; ++r) memcpy(unit.data[t][r], at + r * step, unit.bytes[t]);
}

void t3c_tilestored64(int8_t t, uint8_t* at, int64_t step) {
  use(t);
  for (int r = 0; r < unit.rows[t]; ++r) memcpy(at + r * step, unit.data[t][r], unit.bytes[t]);
}

static void add_products(int c, int a, int b, int is_signed) {
  use(a), use(b), use(c);
  require(a != b && b != c && a != c, "one register twice");
  require(unit.rows[c] == unit.rows[a] && unit.bytes[c] == unit.bytes[b] && unit.bytes[a] == 4 * unit.rows[b],
          "shapes that do not fit");
  for (int m = 0; m < unit.rows[a]; ++m) {
    for (int n = 0; n < unit.bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &unit.data[c][m][4 * n], sizeof sum);
      for (int k = 0; k < unit.bytes[a]; ++k) {
        uint8_t x = unit.data[a][m][k];
        sum += (is_signed ? (int8_t)x : x) * (int8_t)unit.data[b][k / 4][4 * n + k % 4];
      }
      memcpy(&unit.data[c][m][4 * n], &sum, sizeof sum);
    }
  }
}

void t3c_tdpbssd(int8_t c, int8_t a, int8_t b) { add_products(c, a, b, 1); }
void t3c_tdpbusd(int8_t c, int8_t a, int8_t b) { add_products(c, a, b, 0); }
