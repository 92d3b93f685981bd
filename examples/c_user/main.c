/* A plain C program over the pool: gets objects in bulk, uses them, gives them back. */
#include <pyruntime/pyruntime.h>
#include <stdio.h>
#include <string.h>

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, pyrt_last_error());
  return 1;
}

int main(void) {
  pyrt_pool_options options;
  pyrt_pool* pool = NULL;
  void* objects[32];
  size_t i;

  if (pyrt_abi_version() != PYRT_ABI_VERSION) return failed("library and header differ");
  pyrt_pool_options_init(&options);
  options.object_bytes = 2048;
  options.capacity = 1000;
  if (pyrt_pool_create(&options, &pool) != PYRT_OK) return failed("create");
  if (pyrt_pool_get_bulk(pool, objects, 32) != PYRT_OK) return failed("get");
  for (i = 0; i < 32; ++i) memset(objects[i], (int)i, 2048);
  if (pyrt_pool_put(pool, (char*)objects[0] + 1) != PYRT_EINVAL) return failed("misaligned put");
  if (pyrt_pool_put_bulk(pool, objects, 32) != PYRT_OK) return failed("put");
  if (pyrt_pool_check(pool) != PYRT_OK) return failed("check");
  if (pyrt_pool_destroy(pool, 0) != PYRT_OK) return failed("destroy");
  printf("pyruntime %s, %s\n", pyrt_version(), pyrt_simd_level());
  return 0;
}
