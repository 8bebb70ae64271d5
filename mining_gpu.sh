#!/bin/bash
# GPU check of mining, dequantize and store: tests, then timings, then variants of some constants.
# From the repository root.
set -o pipefail
# Variants of some constants: name, header, sed expression, op.
variant() {
  rm -rf /tmp/v/$1 && mkdir -p /tmp/v/$1 && cp -r kernels/patternkv_kernels /tmp/v/$1/ && sed -i "$3" /tmp/v/$1/patternkv_kernels/include/patternkv/$2
  PYTHONPATH=/tmp/v/$1 python -m patternkv_kernels.build --op $4 --bits 4:4 --head-dim 128 > /tmp/v/$1/log 2>&1 &
}
variant dequantize_base dequantize.cuh 's/x/x/' dequantize
variant dequantize_batch2 dequantize.cuh 's/kBatch = 4;/kBatch = 2;/' dequantize
variant dequantize_64registers dequantize.cuh 's/(kThreads, 3)/(kThreads, 4)/' dequantize
variant dequantize_plain_stores ptx.cuh 's/__stcs(at, x)/*at = x/' dequantize
variant dequantize_no_allocate ptx.cuh 's/ld.global.nc.u32/ld.global.nc.L1::no_allocate.u32/' dequantize
variant store_base store.cuh 's/x/x/' store
variant store_one_tile store.cuh 's/kManyAtOnce = 2;/kManyAtOnce = 1;/' store
variant store_four_tiles store.cuh 's/kManyAtOnce = 2;/kManyAtOnce = 4;/' store
variant store_four_blocks store.cuh 's/HEAD_DIM <= 128 ? 3 : 2/4/' store
variant store_no_prefetch ptx.cuh 's/^  asm volatile("prefetch.*$//' store
variant mining_base mining.cuh 's/x/x/' mining
variant mining_one_block mining.cuh 's/HEAD_DIM <= 128 ? 2 : 1/1/' mining
python -m patternkv_kernels.build --jobs 16 --op mining dequantize store 2>&1 | tail -1
wait
timeout 120 python -m pytest -q --maxfail=6 --tb=short -m gpu tests/test_mining.py tests/test_store_cuda.py \
  -k "not follows_the_reference or bits0 or bits2" -p no:cacheprovider 2>&1 | grep -v SKIPPED | tail -40
cat > /tmp/mining_gpu.py <<'PY'
import sys, time, torch
from patternkv_kernels import LayerTables, SlotFormat, dequantize, mine_kv, mine_table, store_kv
from benchmarks.timing import measure
dev = torch.device("cuda"); torch.manual_seed(0)
print(torch.cuda.get_device_name())
src = [torch.empty(1 << 28, dtype=torch.uint8, device=dev) for _ in range(2)]
t = measure([lambda: src[0].copy_(src[1])], dev).us
copy = 2 * (1 << 28) / t / 1e3
print(f"copy {copy:.0f} GB/s")
del src
def kv(n, hq=32, h=8, d=128):
    x = torch.randn(n, hq + 2 * h, d, device=dev).bfloat16()
    return x[:, :hq], x[:, hq : hq + h], x[:, hq + h :]
for n in (512, 2048, 32768):
    for P in (64, 256):
        sets = [kv(n) for _ in range(6 if n < 9999 else 2)]
        tables = LayerTables.allocate(4, 8, P, 128, dev)
        def call(s, impl="cuda"):
            return lambda: mine_kv(*s, num_patterns=P, num_sinks=4, bits=(4, 4), out=tables.table(1), impl=impl)
        us = measure([call(s) for s in sets], dev).us
        hot = measure([call(sets[0])], dev).us
        torch.cuda.synchronize(); t0 = time.perf_counter()
        for _ in range(100): call(sets[0])()
        host = (time.perf_counter() - t0) * 1e4
        torch.cuda.synchronize(); wall = (time.perf_counter() - t0) * 1e4
        ref = measure([call(sets[0], "reference")], dev).us if n == 2048 else float("nan")
        print(f"mine n={n} P={P}: cold {us:.0f} us, hot {hot:.0f}, host {host:.0f}, 100 calls {wall:.0f} us each; reference graph {ref:.0f}")
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
    call(sets[0])(); torch.cuda.synchronize()
print("launches:", [(e.key[:60], e.count) for e in prof.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA])
x = kv(2048)[0][:, :16].contiguous()
for P in (1, 64, 256):
    row = [measure([lambda: mine_table(x, num_patterns=P, num_sinks=0, bits=4, iterations=i, impl="cuda")], dev).us for i in (0, 1, 3, 9)]
    print(f"mine_table 16 heads P={P} iterations 0,1,3,9:", " ".join(f"{u:.0f}" for u in row))
for d in (64, 256):
    x = torch.randn(2048, 16, d, device=dev).bfloat16()
    print(f"mine_table d={d} P=256: {measure([lambda: mine_table(x, num_patterns=256, num_sinks=4, bits=4, impl='cuda')], dev).us:.0f} us")
del x, sets
n, h, d = 65536, 8, 128
_, k, v = kv(n); k, v = k.contiguous(), v.contiguous()
for bits, P in (((4, 4), 64), ((4, 4), 256), ((2, 2), 64), ((2, 2), 256)):
    fmt = SlotFormat(*bits, d, 1, h_kv=h)
    tables = LayerTables.allocate(2, h, P, d, dev); tables.patterns.normal_()
    buf = fmt.allocate(n + 7, dev)
    slots = torch.randperm(n, device=dev).int(); ids = torch.zeros(n, dtype=torch.int32, device=dev)
    st = lambda s: lambda: store_kv(fmt, buf, s, k, v, tables, ids, impl="cuda")
    nbytes = n * h * (fmt.bytes_per_slot + 4 * d)
    order = torch.arange(n, device=dev).int()
    out = (torch.empty_like(k), torch.empty_like(v))
    row = []
    for s in (slots, order):
        a = measure([st(s)], dev).us
        b = measure([lambda: dequantize(fmt, buf, s, tables, ids, torch.bfloat16, out, impl="cuda")], dev).us
        row.append(f"store {a:.0f} us {nbytes/a/1e3:.0f} GB/s {100*nbytes/a/1e3/copy:.0f}%  dequantize {b:.0f} us {nbytes/b/1e3:.0f} GB/s {100*nbytes/b/1e3/copy:.0f}%")
    print(bits, P, "random slots:", row[0], "| ordered:", row[1])
import patternkv_kernels.jit as jit
from pathlib import Path
fmt = SlotFormat(4, 4, d, 1, h_kv=h); buf = fmt.allocate(n, dev)
tables = LayerTables.allocate(2, h, 64, d, dev); tables.patterns.normal_()
sets = [kv(2048) for _ in range(6)]
for folder in sorted(Path("/tmp/v").iterdir()):
    jit._PACKAGE = folder / "patternkv_kernels"
    for cached in (jit.load_variant, jit.include_folders, jit._source_digest): cached.cache_clear()
    calls = {"store": [lambda: store_kv(fmt, buf, slots, k, v, tables, ids, impl="cuda")],
             "dequantize": [lambda: dequantize(fmt, buf, slots, tables, ids, torch.bfloat16, out, impl="cuda")],
             "mining": [lambda s=s: mine_kv(*s, num_patterns=64, num_sinks=4, bits=(4, 4), out=tables.table(1), impl="cuda") for s in sets]}
    try: print(folder.name, f"{measure(calls[folder.name.split('_')[0]], dev).us:.0f} us")
    except Exception as e: print(folder.name, repr(e)[:200])
PY
timeout 60 python /tmp/mining_gpu.py 2>&1 | tail -40
