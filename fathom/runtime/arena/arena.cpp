// Where torch's tensors on the CPU live: an allocator for c10 that keeps what is freed, and keeps it in one piece.
//
// glibc, asked for memory aligned to 64 bytes, takes up to 96 more than it keeps, gives the rest back, and small objects
// settle there; a freed piece then neither holds one of its own size again nor joins its neighbours. A training step,
// which frees and takes gigabytes in pieces of all sizes, so needed up to half as much again as it had in use (docs/log/memory.md).
//
// Here pieces are multiples of 64 bytes that lie side by side, with the books kept elsewhere, in address space reserved
// once. Small tensors have a stretch of their own, so that one which stays does not part the room of large ones.

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
constexpr size_t kTiny = 1024;                // below, glibc: books would cost as much as the tensor
constexpr size_t kLarge = size_t(256) << 10;  // from here on among the large ones

// A stretch of address space, pieces of it taken and free.
class SequenceChunk {
  public:
    SequenceChunk(char* begin, char* end) : begin_(begin), end_(end) { add(begin, end - begin); }

    bool holds(const char* piece) const { return begin_ <= piece && piece < end_; }

    // The smallest free piece that will do. A hole between pieces is filled from its high end, the open end of the
    // stretch from its low one: a forward pass climbs, the backward pass frees from the top, and what it leaves there
    // (gradients) then parts no room of what is freed next.
    char* take(size_t size) {
        size = (size + kAlignment - 1) / kAlignment * kAlignment;
        auto found = by_size_.lower_bound({size, nullptr});
        if (found == by_size_.end()) return nullptr;
        auto [room, at] = *found;
        remove(free_.find(at));
        bool open = at + room == end_;
        char* piece = open ? at : at + room - size;
        if (room > size) add(open ? at + size : at, room - size);
        taken_[piece] = size;
        in_use_ += size;
        reached_ = std::max(reached_, size_t(piece + size - begin_));
        return piece;
    }

    void give_back(char* piece) {
        auto found = taken_.find(piece);
        size_t size = found->second;
        taken_.erase(found);
        in_use_ -= size;
        auto next = free_.lower_bound(piece);
        if (next != free_.end() && next->first == piece + size) {
            size += next->second;
            remove(next++);
        }
        if (next != free_.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == piece) {
                piece = before->first;
                size += before->second;
                remove(before);
            }
        }
        add(piece, size);
    }

    size_t in_use() const { return in_use_; }
    size_t reached() const { return reached_; }

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
    std::unordered_map<char*, size_t> taken_;
    size_t in_use_ = 0, reached_ = 0;
};

struct Arena {
    std::mutex mutex;
    SequenceChunk small, large;
};

Arena* arena = nullptr;  // lives as long as the process, for so do tensors

void release(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    char* piece = static_cast<char*>(data);
    for (SequenceChunk* stretch : {&arena->small, &arena->large}) {
        if (stretch->holds(piece)) {
            std::lock_guard<std::mutex> guard(arena->mutex);
            stretch->give_back(piece);
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
            data = (size < kLarge ? arena->small : arena->large).take(size);
        }
        if (size && !data) data = c10::alloc_cpu(size);  // tiny, or the stretch is full; says so where memory is out
        if (data) c10::profiledCPUMemoryReporter().New(data, size);
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

// Address space of `size` bytes, in huge pages where the kernel has them; memory comes when it is touched.
char* reserved(size_t size) {
    void* at = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    char* begin = reinterpret_cast<char*>((reinterpret_cast<size_t>(at) + kHugePage - 1) / kHugePage * kHugePage);
    madvise(begin, size, MADV_HUGEPAGE);  // a kernel without them refuses, which changes nothing
    return begin;
}

}  // namespace

// Let torch's new tensors live in stretches of `size` bytes each. Returns 0, or 1 where there is no such room.
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

// Bytes of tensors there, and how far their stretches were ever filled.
extern "C" void arena_stats(size_t* in_use, size_t* reached) {
    std::lock_guard<std::mutex> guard(arena->mutex);
    *in_use = arena->small.in_use() + arena->large.in_use();
    *reached = arena->small.reached() + arena->large.reached();
}
