// The allocator of torch's tensors on the CPU: keeps freed memory, almost without fragmentation.
//
// To align memory to 64 bytes glibc allocates up to 96 bytes more and frees the rest, where small objects then settle;
// a freed block neither fits one of its own size again nor merges with its neighbours. A training step, which allocates
// and frees gigabytes in blocks of all sizes, needed up to half as much again as it had in use (docs/log/memory.md).
//
// Here blocks are multiples of 64 bytes side by side, with the bookkeeping elsewhere, in address space reserved once.
// Small tensors have a region of their own, so that a long-lived one does not split the space of large ones.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kTiny = 1024;                // smaller ones are glibc's: bookkeeping would cost as much as they do
constexpr size_t kLarge = size_t(256) << 10;  // from this size on a tensor is large

// A region of address space, divided into used and free blocks.
class Region {
  public:
    Region(char* begin, char* end) : begin_(begin), end_(end) { add(begin, end - begin); }

    bool holds(const char* block) const { return begin_ <= block && block < end_; }

    // Best fit. A hole is filled from its high end, the unused end of the region from its low one: a forward pass grows
    // upwards, the backward pass frees from the top, and the gradients that it leaves there do not split what is freed
    // next.
    char* allocate(size_t size) {
        size = (size + kAlignment - 1) / kAlignment * kAlignment;
        auto found = by_size_.lower_bound({size, nullptr});
        if (found == by_size_.end()) return nullptr;
        auto [room, at] = *found;
        remove(free_.find(at));
        bool open = at + room == end_;
        char* block = open ? at : at + room - size;
        if (room > size) add(open ? at + size : at, room - size);
        used_[block] = size;
        in_use_ += size;
        peak_ = std::max(peak_, size_t(block + size - begin_));
        return block;
    }

    void free(char* block) {
        auto found = used_.find(block);
        size_t size = found->second;
        used_.erase(found);
        in_use_ -= size;
        auto next = free_.lower_bound(block);
        if (next != free_.end() && next->first == block + size) {
            size += next->second;
            remove(next++);
        }
        if (next != free_.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == block) {
                block = before->first;
                size += before->second;
                remove(before);
            }
        }
        add(block, size);
    }

    size_t in_use() const { return in_use_; }
    size_t peak() const { return peak_; }

  private:
    void add(char* at, size_t size) {
        free_[at] = size;
        by_size_.insert({size, at});
    }

    void remove(std::map<char*, size_t>::iterator which) {
        by_size_.erase({which->second, which->first});
        free_.erase(which);
    }

    char *begin_, *end_;
    std::map<char*, size_t> free_;
    std::set<std::pair<size_t, char*>> by_size_;
    std::unordered_map<char*, size_t> used_;
    size_t in_use_ = 0, peak_ = 0;
};

struct Arena {
    std::mutex mutex;
    Region small, large;
};

Arena* arena = nullptr;  // lives as long as the process, as tensors may

void release(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    char* block = static_cast<char*>(data);
    for (Region* region : {&arena->small, &arena->large}) {
        if (region->holds(block)) {
            std::lock_guard<std::mutex> guard(arena->mutex);
            region->free(block);
            return;
        }
    }
    c10::free_cpu(data);
}

class Allocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t size) override {
        void* data = nullptr;
        if (size >= kTiny) {
            std::lock_guard<std::mutex> guard(arena->mutex);
            data = (size < kLarge ? arena->small : arena->large).allocate(size);
        }
        if (size && !data) data = c10::alloc_cpu(size);  // tiny, or the region is full; raises when out of memory
        if (data) c10::profiledCPUMemoryReporter().New(data, size);
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

// Address space of `size` bytes, in huge pages where the kernel has them; pages are allocated when they are touched.
char* reserved(size_t size) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* at = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    char* begin = reinterpret_cast<char*>((reinterpret_cast<size_t>(at) + kHugePage - 1) / kHugePage * kHugePage);
    madvise(begin, size, MADV_HUGEPAGE);  // a kernel without them refuses, which changes nothing
    return begin;
}

}  // namespace

// Allocates torch's new tensors in regions of `size` bytes each. Returns 0, or 1 without enough address space.
extern "C" int arena_install(size_t size) {
    if (arena) return 0;
    size = size / kHugePage * kHugePage;
    char* begin = reserved(2 * size);
    if (!begin) return 1;
    arena = new Arena{{}, {begin, begin + size}, {begin + size, begin + 2 * size}};
    // A child must not inherit a lock that another thread held.
    pthread_atfork([] { arena->mutex.lock(); }, [] { arena->mutex.unlock(); }, [] { arena->mutex.unlock(); });
    c10::SetCPUAllocator(new Allocator, 1);
    return 0;
}

// Bytes of tensors in the arena, and the most that their regions ever spanned.
extern "C" void arena_stats(size_t* in_use, size_t* peak) {
    std::lock_guard<std::mutex> guard(arena->mutex);
    *in_use = arena->small.in_use() + arena->large.in_use();
    *peak = arena->small.peak() + arena->large.peak();
}
