/* Checks that a jump to the stock library keeps every register and the stack. Both sides are here: with -DSTOCK the
 * functions that the stock library of this test has, under names of pass-through functions but with signatures that use
 * all argument registers, the stack, and results in memory. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

struct big {
  long words[16];
};

typedef struct big (*everything)(long, long, long, long, long, long, long, long, long, struct big, double, double,
                                 double, double, double, double, double, double, double, float);
typedef double (*variadic)(const char *, ...);
typedef struct {
  int a, b, c;
} triple;
typedef triple (*small)(const void *);

#ifdef STOCK
#include <stdarg.h>
__attribute__((visibility("default"))) struct big ncclDevCommCreate(long a, long b, long c, long d, long e, long f, long g,
                                                                long h, long i, struct big s, double p, double q,
                                                                double r, double t, double u, double v, double w,
                                                                double x, double y, float z) {
  struct big result = s;
  result.words[0] = a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + s.words[15];
  result.words[1] = (long)(p + 2 * q + 3 * r + 4 * t + 5 * u + 6 * v + 7 * w + 8 * x + 9 * y + 10 * z);
  return result;
}
__attribute__((visibility("default"))) double pncclMemAlloc(const char *format, ...) {
  va_list list;
  double sum = 0;
  va_start(list, format);
  for (; *format; ++format) sum += *format == 'i' ? va_arg(list, int) : va_arg(list, double);
  va_end(list);
  return sum;
}
__attribute__((visibility("default"))) triple ncclTeamWorld(const void *comm) {
  triple result = {1, 2, comm != NULL};
  return result;
}
#else
#include <dlfcn.h>
int main(int count, char **arguments) {
  void *library = count > 1 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!library) return printf("open error %s\n", dlerror()), 1;
  everything all = (everything)dlsym(library, "ncclDevCommCreate");
  variadic some = (variadic)dlsym(library, "pncclMemAlloc");
  small team = (small)dlsym(library, "ncclTeamWorld");
  struct big in;
  for (int i = 0; i < 16; ++i) in.words[i] = 100 + i;
  for (int round = 0; round < 2; ++round) { /* the first call takes the long way, the second the short one */
    struct big out = all(1, 2, 3, 4, 5, 6, 7, 8, 9, in, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
    double sum = some("idid", 1, 2.5, 3, 4.5);
    triple three = team(&in);
    printf("registers %ld %ld %ld variadic %.1f team %d %d %d\n", out.words[0], out.words[1], out.words[15], sum,
           three.a, three.b, three.c);
  }
  return 0;
}
#endif
